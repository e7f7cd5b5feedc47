"""A model with its attention as a file for other runtimes: ONNX."""
