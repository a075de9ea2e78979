"""The frame of all quantizers, what methods share, and a file for each paper."""
