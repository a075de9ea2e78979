"""The way out: trained networks for engines, and predictions with them."""
