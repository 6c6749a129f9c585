"""The serving wing: verify, install, prime, seal, count. Never raises by default, never touches the hit path."""
