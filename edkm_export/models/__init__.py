"""Loading Hugging Face models, and export-friendly decoders for their families."""
