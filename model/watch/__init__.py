"""Measurements of a network: its cost, the state of its quantizers, its products."""
