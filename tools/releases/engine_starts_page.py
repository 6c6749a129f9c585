"""The tables of engine starts in the docs, from the records of `tools/check_vllm_starts` and `tools/check_sglang_starts`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_END = "<!-- until here -->\n"
Column = Callable[[dict[str, Any]], object]


@dataclass(frozen=True)
class Page:
    """A page with the table of an engine.

    Args:
        engine: its name, as in the record.
        title: the heading of its versions.
        columns: heading → what a row of the record says.
    """

    engine: str
    title: str
    columns: Mapping[str, Column]

    @property
    def record(self) -> Path:
        return ROOT / "artifacts" / "measurements" / f"{self.engine}_without_gpu.json"

    @property
    def path(self) -> Path:
        return ROOT / "docs" / f"{self.engine}.md"

    @property
    def _begin(self) -> str:
        return f"<!-- written by tools/check_{self.engine}_starts -->\n"

    def read(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Version → model → row of the record."""
        found: dict[str, dict[str, dict[str, Any]]] = json.loads(self.record.read_text())[self.engine]
        return found

    def table(self) -> str:
        """One row for each version and model."""
        head = (self.title, "model", *self.columns)
        rows = [head, ("---",) * len(head)]
        for version, models in sorted(self.read().items()):
            for name, row in models.items():
                told = [row["error"]] if "error" in row else [str(column(row)) for column in self.columns.values()]
                rows.append((version, name, *told, *[""] * (len(head) - 2 - len(told))))
        return "".join(f"| {' | '.join(row)} |\n" for row in rows)

    def in_page(self) -> str:
        """The table that stands in the page now."""
        return self.path.read_text().partition(self._begin)[2].partition(_END)[0]

    def write(self) -> None:
        """Write the record's table into the page."""
        begin, mark, rest = self.path.read_text().partition(self._begin)
        _, end, after = rest.partition(_END)
        if not (mark and end):
            raise SystemExit(f"{self.path} has no place for the table")
        self.path.write_text(begin + mark + self.table() + end + after)


_REACHED: dict[str, Column] = {
    "kinds of requests answered": lambda row: row["requests"],
    "not reached": lambda row: len(row["unreached"]),
    "specializations": lambda row: row["units"],
}
_TOOK: dict[str, Column] = {
    "seconds": lambda row: row["seconds"],
    "GiB": lambda row: row["largest process, GiB"],
}
VLLM = Page("vllm", "vLLM", {**_REACHED, "models compiled": lambda row: len(row["models"]), **_TOOK})
SGLANG = Page(
    "sglang",
    "SGLang",
    {**_REACHED, "graphs": lambda row: row["graphs"], "CPU seconds": lambda row: row["cpu seconds"], **_TOOK},
)
PAGES = (VLLM, SGLANG)
