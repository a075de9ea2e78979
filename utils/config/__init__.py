"""Options, keywords and the configuration that they become."""
