"""The only rooms that touch private names of torch and triton, one module a subject.

`versions.py` holds the table of versions for which each was seen to hold; `tests/test_upstream_contract.py` fails loudly
when upstream moves.
"""
