"""Kinds of data sets by name."""

FOLDER_SETS = ("imagenet", "shards", "dali")  # photographs in --root, whose classes have names
WITHOUT_FILES = ("digits", "glyphs", "fake")  # computed, or come with a package
