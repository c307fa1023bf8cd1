"""Kernels, one folder per op: `api` (entry), `reference` (definition), one module per backend."""
