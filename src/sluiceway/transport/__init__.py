"""How messages move between a server and its clients."""
