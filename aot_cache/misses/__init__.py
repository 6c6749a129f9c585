"""What a serving process missed: the misses file, and which declaration would have covered a miss."""
