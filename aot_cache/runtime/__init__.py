"""The serving half: verify, install, load, seal, count. By default nothing here raises, and nothing is on the hit path."""
