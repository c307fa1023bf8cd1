"""The verbs of `wallwm`: one module each, `add_parser` plus functions that join the packages and
print."""
