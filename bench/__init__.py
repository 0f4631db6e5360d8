"""Times: what each stage takes on this machine."""
