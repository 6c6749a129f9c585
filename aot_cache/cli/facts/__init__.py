"""The results of the commands as plain JSON-able dicts, as printed by `--json`. Formats nothing."""
