"""A line of a misses file, for tests of what reads one."""

from typing import Any

MISS: dict[str, Any] = {
    "aot-cache miss": 1,
    "kind": "graph",
    "name": "m:layer",
    "in_capture": True,
    "sealed": True,
    "action": "eager",
    "why": "size 0 of x is 600",
    "pid": 1,
    "seen": 12,
    "place": "m.py:3",
    "wrapping": {},
    "mode": "inference",
    "structure": "0123456789abcdef",
    "sizes": {"L['x']": [600, 16]},
    "points": {"decode": {"n": 600}},
    "declare": "decode: n=Range(1, 600)",
}
