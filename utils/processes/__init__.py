"""Processes: one training on many, signals that ask it to end, the launcher."""
