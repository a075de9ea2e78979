"""Core ML: packages for iPhones and Macs."""
