"""The only modules that use private names of torch and Triton, one module for each subject.

Each lists under "Upstream" what it relies on. Tests with the mark `contract` check that, and fail loudly when upstream changes.
`tools/check_torch` runs them under other releases, and writes to `tested.json` where they passed.
"""
