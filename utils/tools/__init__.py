"""The jobs of tools.py."""
