"""What a serving process missed: the file of it, and which declaration would have covered it."""
