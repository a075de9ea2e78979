"""Checkpoint files, their contents, and the files of a case."""
