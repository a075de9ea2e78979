"""Image sets in tar files: the format, reading by offset, and writing from what people have."""
