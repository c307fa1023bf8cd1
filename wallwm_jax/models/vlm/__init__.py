"""Qwen3.5: text backbone, vision tower, cache, and the heads that read it."""
