"""Modules under their names of 0.1."""
