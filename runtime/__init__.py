"""How the scripts run: command line, processes and devices, precision, randomness, files. Imports only ``models``."""
