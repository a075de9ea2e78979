"""Networks and their quantizers."""
