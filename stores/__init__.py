"""What lies on disk, one owner for each format. Imports only ``runtime``, ``diffusion`` and the models."""
