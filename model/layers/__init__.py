"""Layers: quantized ones, norms, and what configurations choose among."""
