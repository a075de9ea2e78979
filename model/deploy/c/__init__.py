"""A network as a C header, and running it with a C compiler."""
