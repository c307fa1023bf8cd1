"""Attention of a few query rows over a long cache of keys and values, read once."""
