"""The offline part: trace on a virtual device, compile for a target, store."""
