"""Hooks in torch and Triton for serving and recording. On miss paths only, and removable (see `upstream.patch`)."""
