"""Frozen text encoders: captions to features, on the host."""
