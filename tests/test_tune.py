"""aot_cache.tune: what is chosen from measurements (measuring itself needs a GPU: tests/gpu)."""

from __future__ import annotations

from aot_cache.tune import LIKELY, _Times


def times(*measurements: tuple[int, str, float]) -> _Times:
    result = _Times()
    for candidate, point, ms in measurements:
        result.add(candidate, point, (ms, ms * 0.9, ms * 1.1))
    return result


def test_the_least_mean_slowdown_wins() -> None:
    """Not the least sum: a long prompt would decide alone."""
    result = times((0, "long", 10.0), (1, "long", 10.4), (0, "short", 1.3), (1, "short", 1.0))
    assert result.best() == 1
    assert result.slowdowns() == {0: (1.0 + 1.3) / 2, 1: (1.04 + 1.0) / 2}


def test_one_bad_round_does_not_decide() -> None:
    result = times((0, "p", 1.0), (1, "p", 1.02), (0, "p", 1.5), (1, "p", 1.03), (0, "p", 1.01), (1, "p", 1.02))
    assert result.best() == 0
    assert result.to_json()["ms"] == {"0": [[1.01, 0.909, 1.111]], "1": [[1.02, 0.918, 1.122]]}


def test_only_likely_candidates_are_measured_again() -> None:
    assert times((0, "p", 1.0), (1, "p", LIKELY - 0.01), (2, "p", LIKELY + 0.01)).likely() == {0, 1}


def test_a_candidate_that_was_not_measured_at_every_point_is_not_chosen() -> None:
    result = times((0, "a", 1.0), (1, "a", 2.0), (1, "b", 2.0))
    assert result.best() == 1 and result.times().keys() == {1}


def test_nothing_measured() -> None:
    assert _Times().best() is None and _Times().likely() == set()
