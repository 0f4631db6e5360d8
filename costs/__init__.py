"""Counts: the needs of a command and the cost of a model, from shapes alone."""
