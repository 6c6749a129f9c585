"""Graphs for which upstream has no cache key are not taken for one another, whatever seed a recipe sets."""

from __future__ import annotations

import random

from aot_cache.upstream.hooks import inductor_artifact


def test_a_key_that_is_drawn_is_drawn_anew() -> None:
    drawn = []
    for _ in range(3):
        random.seed(0)
        with inductor_artifact._keys_of_their_own():
            drawn.append(random.random())
        drawn.append(random.random())
    random.seed(0)
    assert len(set(drawn[::2])) == 3 and set(drawn[1::2]) == {random.random()}
