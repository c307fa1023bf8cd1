"""Poses, cameras and what cameras see: pure functions, no I/O, no model code."""
