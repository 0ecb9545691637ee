"""The NVFlare engine: a server and sites on machines of their own, joined by mutual TLS."""
