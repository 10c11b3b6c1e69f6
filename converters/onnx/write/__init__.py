"""From a checkpoint to ONNX folders."""
