"""What is built, as data: keys, targets, plans, manifests. Imports neither torch nor Triton."""
