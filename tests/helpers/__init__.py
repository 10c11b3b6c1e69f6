"""What tests build models, checkpoints and artifacts with."""
