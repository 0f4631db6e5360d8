"""The formats on disk, one owner for each. Imports only ``runtime``, ``diffusion`` and the models."""
