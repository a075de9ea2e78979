"""Sets of images in tar files."""
