"""ExecuTorch's files (.pte): writing, reading and running them."""
