"""How one client trains: the local half of a federated round."""
