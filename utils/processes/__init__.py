"""Processes: training on several of them, signals that ask it to end, the launcher."""
