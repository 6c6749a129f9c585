"""The virtual device: tensors without memory, a Triton driver, and an Inductor that compiles for the target.

Only for the builder's own processes: nothing here is undone.
"""
