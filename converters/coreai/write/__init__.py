"""From a checkpoint to Core AI models."""
