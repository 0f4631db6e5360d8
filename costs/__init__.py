"""Counts: what a command needs and what a model costs, from shapes alone."""
