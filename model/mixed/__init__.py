"""Bits where they count: what each layer loses with few bits, and the bits that fit a budget."""
