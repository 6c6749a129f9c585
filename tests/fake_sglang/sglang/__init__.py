"""A stand-in for SGLang: its names and the order of its calls at start-up, and none of its code."""
