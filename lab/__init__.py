"""Experiments on the small worlds: digits and emoji."""

import os

os.environ["MPLBACKEND"] = "Agg"  # figures are files; a notebook's backend, in its shell, need not be installed here
