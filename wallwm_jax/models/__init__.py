"""The world-action model. Flax lives only in this package; `functional` is the only door to it."""
