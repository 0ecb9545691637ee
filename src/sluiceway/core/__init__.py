"""What both halves stand on: batches, settings, messages, guards, the round loop, checkpoints."""
