"""Softmax attention over [B, S, heads, hd] arrays with a boolean mask and an additive bias."""
