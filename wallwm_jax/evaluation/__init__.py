"""Scores, intervals and the report. Everything here receives functions and arrays; nothing builds a
model."""
