"""GGUF files: what llama.cpp stores, read key by key and tensor by tensor into a transformers model."""
