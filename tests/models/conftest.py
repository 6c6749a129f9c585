"""What tests of models share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def _eager() -> Iterator[None]:
    """What is computed is tested here, and compiling it for a CPU takes minutes.

    One thread: on tensors this small a second one, on a busy machine, makes all of it ten times slower.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        yield
    torch.set_num_threads(threads)
