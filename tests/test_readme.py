"""The README and docs/: its examples run as they are printed, its links lead somewhere, and its options are there."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from limits import HANGS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LIMIT = 8192
EXAMPLES = {"A complete example, on a CPU": 2, "A Hugging Face model": 1}
"""Section → graphs that its server finds in the bundle."""


def sections(text: str) -> dict[str, str]:
    """Heading → what stands under it."""
    parts = re.split(r"^## (.+)\n", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


# --- the README -------------------------------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len(README.read_bytes()) <= LIMIT


def test_the_first_example_has_at_most_20_lines_beside_imports_and_comments() -> None:
    code = "".join(blocks(sections(README.read_text())[next(iter(EXAMPLES))], "python"))
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith(("import ", "from ", "#"))]
    assert len(lines) <= 20


@pytest.mark.parametrize("section", EXAMPLES)
def test_an_example_hits_and_prints_what_the_readme_says(section: str, tmp_path: Path) -> None:
    if "Hugging Face" in section:
        pytest.importorskip("transformers")
    text = sections(README.read_text())[section]
    for code in blocks(text, "python"):
        (tmp_path / code.split()[1]).write_text(code)  # its first line is "# name.py"
    (commands,) = blocks(text, "bash")
    (wanted,) = blocks(text, "text")
    for command in commands.splitlines():
        done = run(command, tmp_path)
        assert done.returncode == 0, f"{command}: {done.stderr[-3000:]}"
    assert done.stdout.splitlines()[-1] == wanted.strip()
    graphs = EXAMPLES[section]
    assert wanted.strip() == str({"graph": graphs, "frame": 0, "graph_compile": 0, "gcc": 0})


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A line of the README's shell, with this interpreter, this checkout and empty caches."""
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.run(
        ["bash", "-c", re.sub(r"^aot-cache ", "python -m aot_cache ", command)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )


# --- all pages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    lost = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if not leads(page, link)]
    assert not lost, f"{page.name}: {lost}"


def leads(page: Path, link: str) -> bool:
    if re.match(r"[a-z]+:", link):
        return True
    name, _, anchor = link.partition("#")
    target = (page.parent / name).resolve() if name else page
    if not target.exists():
        return False
    return not anchor or anchor in anchors(target)


@cache
def anchors(page: Path) -> set[str]:
    """The headings of a page, as links name them."""
    heads = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", head).strip().lower()) for head in heads}


def test_every_page_is_in_the_menu_and_in_the_index() -> None:
    names = {page.name for page in (ROOT / "docs").glob("*.md")}
    assert set(re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)) == names
    index = (ROOT / "docs" / "index.md").read_text()
    assert set(re.findall(r"\]\(([\w-]+\.md)\)", index)) == names - {"index.md"}


COMMAND = re.compile(r"aot-cache ([a-z]+)((?:\s+[^\s`|;&]+)*)")


def said(page: Path) -> Iterator[tuple[str, str]]:
    """(command, option) of every `aot-cache …` in the page's code; the option is empty where it has none."""
    text = page.read_text().replace("\\\n", " ")
    code = [line for block in re.findall(r"^```\w*\n(.*?)^```$", text, re.M | re.S) for line in block.splitlines()]
    code += re.findall(r"`([^`\n]+)`", re.sub(r"^#.*", "", prose(page), flags=re.M))  # headings have messages
    for line in code:
        for name, rest in COMMAND.findall(re.sub(r"\s#.*", "", line)):
            yield name, ""
            own = rest.partition(" -- ")[0]  # what follows is another program's
            yield from ((name, option) for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", own))


@cache
def options(command: str) -> str:
    """What `--help` says."""
    done = subprocess.run(
        [sys.executable, "-m", "aot_cache", command, "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200", "TERM": "dumb"},
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    return done.stdout if done.returncode == 0 else ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_are_there(page: Path) -> None:
    lost = [
        f"aot-cache {command} {option}"
        for command, option in sorted(set(said(page)))
        if not re.search(rf"(?<![\w-]){option}(?![\w-])", options(command)) or not options(command)
    ]
    assert not lost, f"{page.name}: {lost}"


def test_the_pages_name_commands() -> None:
    """What reads them reads something."""
    found = {command for page in PAGES for command, _ in said(page)}
    assert found >= {"build", "diff", "explain", "inspect", "record", "rehearse", "targets", "tune", "verify"}
    assert ("build", "--target") in set(said(README))


def test_every_variable_that_is_named_is_read_somewhere() -> None:
    named = {name for page in PAGES for name in re.findall(r"\bAOT_CACHE(?:_[A-Z]+)*\b", page.read_text())}
    source = "".join(path.read_text() for path in (ROOT / "aot_cache").rglob("*.py"))
    assert named and not {name for name in named if not re.search(rf"\b{name}\b", source)}


def literals() -> str:
    """All texts in the package's source, a line each; what is filled in is `…`."""
    texts = []
    for path in (ROOT / "aot_cache").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(" ".join(text.split()) for text in texts)


def test_messages_in_the_headings_of_troubleshooting_are_said() -> None:
    """Whoever searches for what the terminal says finds it: a message that is reworded is reworded here."""
    said_here = literals()
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = [found for line in re.findall(r"^### (.+)$", text, flags=re.M) for found in re.findall(r"`([^`]+)`", line)]
    messages = [found.removeprefix("expected ") for found in quoted if " " in found and not found.startswith("Torch ")]
    assert len(messages) >= 9
    for message in messages:
        # Releases are put into a message with their names.
        for part in filter(None, (part.strip(" :,;") for part in re.split("…|×|torch ", message))):
            assert part in said_here, f"nothing says {part!r}"
