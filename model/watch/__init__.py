"""Looking at a network: its cost, its quantizers' state, what it multiplies."""
