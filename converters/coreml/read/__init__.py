"""Reading and running Core ML packages. Nothing here imports `write`."""
