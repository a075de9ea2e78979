"""Files of MNN."""
