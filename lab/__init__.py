"""Experiments on the small worlds: digits and emoji."""
