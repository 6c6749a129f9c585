"""The offline wing: trace on a virtual device, compile for a target, store."""
