"""The extras that people are told to install: there, and found by every pip."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_extras_that_are_named_are_there() -> None:
    found = metadata.metadata("aot-cache").get_all("Provides-Extra") or []
    assert all(name.isalnum() for name in found)  # pip before 23.3 passes over one with an underscore or a dash
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "tools" / "_setup.sh"]
    text = "".join(page.read_text() for page in pages)
    named = {name for names in re.findall(r'(?:aot-cache|\$root|"\.)\[([\w,.-]+)\]', text) for name in names.split(",")}
    assert named >= {"qwen", "serve"} and named <= set(found)
