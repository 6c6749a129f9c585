"""aot_cache.tuning.kernels: what is chosen from measurements (measuring itself needs a GPU: tests/gpu)."""

from __future__ import annotations

from aot_cache.tuning.kernels import _Times


def times(points: int, **candidates: list[float]) -> _Times:
    """Medians in ms of candidates `c0`, `c1`, ... at each point."""
    measured = {int(name[1:]): [(ms, ms * 0.9, ms * 1.1) for ms in row] for name, row in candidates.items()}
    return _Times([f"p{n}" for n in range(points)], measured)


def test_the_least_mean_slowdown_wins() -> None:
    """Not the least sum: a long prompt would decide alone."""
    assert times(2, c0=[10.0, 1.3], c1=[10.4, 1.0]).best() == 1


def test_the_first_of_equals_wins() -> None:
    assert times(1, c1=[1.0], c0=[1.0]).best() == 0


def test_a_candidate_that_was_not_measured_at_every_point_is_not_chosen() -> None:
    assert times(2, c0=[1.0], c1=[2.0, 2.0]).best() == 1


def test_nothing_measured() -> None:
    assert _Times().best() is None and times(1).best() is None
