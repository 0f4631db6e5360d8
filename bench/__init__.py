"""Times of each stage on this machine."""
