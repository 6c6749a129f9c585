"""The ledgers of an engine's workers on its API server's `/metrics`."""

from __future__ import annotations

import atexit
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from aot_cache.files import scratch
from aot_cache.runtime import stats_files


def publish(add_collector: Callable[[Callable[[], Iterator[Any]]], None]) -> None:
    """In the engine's first process: make the folder in which the workers, which inherit its name, write what they count.

    In each process: if it shows metrics, show what is in the folder.

    Args:
        add_collector: adds a collector's `collect` to what the engine shows.
    """
    if stats_files.VARIABLE not in os.environ:
        folder, _ = scratch.make()  # stays locked as long as this process, or a forked child, lives
        os.environ[stats_files.VARIABLE] = str(folder)
        owner = os.getpid()

        def remove() -> None:
            if os.getpid() == owner:  # a forked child runs this, too
                shutil.rmtree(folder, ignore_errors=True)

        atexit.register(remove)
    add_collector(collect)


def collect() -> Iterator[Any]:
    """`prometheus_client` families of all workers' ledgers, by process."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    from aot_cache.runtime.metrics import COUNTERS, SEALED

    found = stats_files.read(os.environ[stats_files.VARIABLE])
    for key, metric, text in COUNTERS:
        family = CounterMetricFamily(metric.removesuffix("_total"), text, labels=["kind", "pid"])
        for pid, stats in found.items():
            for kind, count in stats[key].items():
                family.add_metric([kind, str(pid)], count)
        yield family
    sealed = GaugeMetricFamily(*SEALED, labels=["pid"])
    for pid, stats in found.items():
        sealed.add_metric([str(pid)], int(stats["sealed"]))
    yield sealed
