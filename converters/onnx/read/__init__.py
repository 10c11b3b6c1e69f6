"""Reading and running ONNX folders. Nothing here imports `write`."""
