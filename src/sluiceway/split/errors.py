"""What can go wrong between the halves."""


class WireError(ValueError):
    """A message between the halves that cannot be read, or that does not belong here."""
