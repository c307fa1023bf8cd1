"""RMS-norm over all heads, then rotation of interleaved pairs, as queries and keys need them."""
