"""Pure inference: event and chunk prediction, closed-loop rollouts, export.

This file imports nothing on purpose: `inference.exported` must load without any model code.
"""
