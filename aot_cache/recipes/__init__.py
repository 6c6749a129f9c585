"""Declarations: callables, their arguments, ranges of sizes, options. Imports neither torch nor Triton."""
