"""Checkpoint files, what is in them, and the files of a case."""
