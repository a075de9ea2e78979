"""LiteRT's files (.tflite): writing and running them."""
