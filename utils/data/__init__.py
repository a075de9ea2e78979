"""Images: the data sets by name, their loaders, decoding and augmentation."""
