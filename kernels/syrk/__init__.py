"""Products that are known to be symmetric, at little more than half the cost of a matmul."""
