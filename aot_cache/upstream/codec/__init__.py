"""Convert objects of torch and Triton to data and back: kernels, guards, code, graphs. Nothing here patches anything."""
