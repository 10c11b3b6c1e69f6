"""Reading and running Core AI models. Nothing here imports `write`; only `runtime.py` needs Apple's package."""
