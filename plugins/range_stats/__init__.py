"""RangeStats: an operator that counts activations inside the graph; see op.py."""
