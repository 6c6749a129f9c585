"""The table of engine starts in docs/vllm.md, from the record that `tools/check_vllm_starts` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "artifacts" / "measurements" / "vllm_without_gpu.json"
PAGE = ROOT / "docs" / "vllm.md"
_BEGIN, _END = "<!-- written by tools/check_vllm_starts -->\n", "<!-- until here -->\n"
_HEAD = (
    "vLLM",
    "model",
    "kinds of requests answered",
    "not reached",
    "specializations",
    "models compiled",
    "seconds",
    "GiB",
)


def table(record: dict[str, Any]) -> str:
    """One row for each version and model."""
    rows = [_HEAD, ["---"] * len(_HEAD)]
    for version, models in sorted(record["vllm"].items()):
        for name, row in models.items():
            if "error" in row:
                rows.append([version, name, row["error"], *[""] * (len(_HEAD) - 3)])
                continue
            lost = len(row["unreached"])
            numbers = (
                row["requests"],
                lost,
                row["units"],
                len(row["models"]),
                row["seconds"],
                row["largest process, GiB"],
            )
            rows.append([version, name, *map(str, numbers)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def in_page(text: str) -> str:
    """The table that stands in the page now."""
    return text.partition(_BEGIN)[2].partition(_END)[0]


def write() -> None:
    """Write the record's table into the page."""
    text = PAGE.read_text()
    begin, mark, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (mark and end):
        raise SystemExit(f"{PAGE} has no place for the table")
    PAGE.write_text(begin + mark + table(json.loads(RECORD.read_text())) + end + after)
