"""A capture that is not there: what torch answers while one is active, on a machine without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch


@contextlib.contextmanager
def capture(available: bool = False) -> Iterator[None]:
    """Inside, CUDA is up and the current stream is captured.

    Args:
        available: a GPU is there, too: torch >= 2.14 asks that before it refuses to compile.
    """
    with contextlib.ExitStack() as stack:
        for name, answer in (
            ("is_initialized", True),
            ("is_current_stream_capturing", True),
            ("is_available", available),
        ):
            stack.enter_context(mock.patch.object(torch.cuda, name, return_value=answer))
        yield
