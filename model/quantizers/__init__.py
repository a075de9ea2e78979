"""The frame of all quantizers, parts that several methods use, and a file for each paper."""
