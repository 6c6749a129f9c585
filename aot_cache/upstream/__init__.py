"""The only rooms that touch private names of torch and triton, one module a subject.

Each says under "Upstream" what it relies on. Tests with the mark `contract` hold that, and fail loudly when upstream moves;
`tools/check_torch` runs them under other releases, and writes into `tested.json` where they passed.
"""
