"""What tests of models share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def _eager() -> Iterator[None]:
    """What is computed is tested here, and compiling it for a CPU takes minutes."""
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        yield
