"""streamconv: turn an LLM checkpoint into a TensorRT-LLM checkpoint in less memory than the model takes."""

__version__ = "0.1.0"
