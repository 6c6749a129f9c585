"""What both a recording of a real program and a start on the virtual device make: a plan of all that was launched and called."""
