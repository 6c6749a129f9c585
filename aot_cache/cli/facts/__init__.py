"""What the commands print, as plain JSON-able dicts: what `--json` gives. Formats nothing."""
