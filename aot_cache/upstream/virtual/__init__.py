"""The device that is not there: tensors without memory, a driver, an Inductor for its target.

For the builder's own processes: what is done here is not undone.
"""
