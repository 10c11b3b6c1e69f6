"""From a checkpoint to Core ML packages."""
