"""A stand-in for TensorRT-LLM: its names and the order of its calls around the capture of CUDA graphs, and none of its code."""
