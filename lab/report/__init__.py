"""The table and the figures of the paper, redrawn from finished runs."""
