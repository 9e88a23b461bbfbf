"""TensorRT-LLM's executor, which schedules its requests itself."""
