"""What is put into torch and Triton while serving or recording: on miss paths only, and given back (see `upstream.patch`)."""
