"""Choose between compiled candidates on the GPU that will serve."""
