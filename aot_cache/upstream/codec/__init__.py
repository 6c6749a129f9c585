"""Torch's and Triton's objects as data, and back: kernels, guards, code, graphs. Nothing here patches anything."""
