"""What all commands share: version, help, completion, -v and -q, errors as text and as JSON, and docs/reference.md."""

from __future__ import annotations

import inspect
import json
import logging
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from limits import HANGS
from typer.models import OptionInfo

import aot_cache
from aot_cache import errors
from aot_cache.artifact.target import TARGETS
from aot_cache.cli.main import app, main
from aot_cache.cli.render import terminal

ROOT = Path(__file__).parents[1]
REFERENCE = (ROOT / "docs" / "reference.md").read_text()
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m aot_cache ARGUMENTS` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "aot_cache", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """`aot-cache ARGUMENTS` in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(terminal.Progress, "FIRST", HANGS)  # however slow the machine is

    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        return code, *capfd.readouterr()

    return call


def test_an_option_that_is_called_as_its_metavar_says_its_name() -> None:
    """typer 0.27 loses it otherwise (`target`, TARGET): `--target` was no option there."""
    found = [
        (name, annotation)
        for command in app.registered_commands
        for name, parameter in inspect.signature(command.callback or print, eval_str=True).parameters.items()
        for annotation in getattr(parameter.annotation, "__metadata__", ())
        if isinstance(annotation, OptionInfo) and annotation.metavar == name.upper()
    ]
    assert "target" in dict(found)
    assert all(f"--{name}" in (option.default, *(option.param_decls or ())) for name, option in found)


# --- the program ------------------------------------------------------------------------------------------------------


def test_the_version(run: Run) -> None:
    assert run("--version") == (0, f"aot-cache {aot_cache.__version__}\n", "")


def test_the_module_is_the_program() -> None:
    done = command("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"aot-cache {aot_cache.__version__}\n", "")
    failed = command("inspect", "nowhere")
    assert failed.returncode == 3 and failed.stderr.startswith("error: no bundle at nowhere\nhint: ")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("aot-cache ver", {"verify"}),
        ("aot-cache build --target h", {name for name in TARGETS if name.startswith("h")}),
        ("aot-cache build --target nat", {"native"}),
        ("aot-cache build --model gated-delta-", {"gated-delta-0.8b"}),
        ("aot-cache verify --dig", {"--digest"}),
    ],
)
def test_shell_completion(words: str, found: set[str]) -> None:
    last = str(len(words.split()) - 1)
    done = command(_AOT_CACHE_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=last)
    assert set(done.stdout.split()) == found, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_that_are_understood(name: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, text, _ = run(name, "--help")
    examples = text.partition("Examples:\n")[2].splitlines()
    assert code == 0 and examples and "-v, --verbose" in text and "-q, --quiet" in text
    for example in examples:
        program, called, *words = shlex.split(example)
        assert (program, called) == ("aot-cache", name)
        COMMANDS[name].make_context(name, words)  # raises where an option is unknown


def test_help_says_the_default_target_and_what_is_inspected(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    build = " ".join(run("build", "--help")[1].split())
    assert "Default: the plan's target with --plan, else this machine's GPU, else h200." in build
    assert "aot-cache inspect [OPTIONS] [BUNDLE]" in run("inspect", "--help")[1]


# --- -v and -q --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("-v", "build"), ("build", "-v")], ids=str)
def test_verbose_logs_to_stderr_and_ends_with_the_command(
    words: tuple[str, ...], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_build(request: object, progress: Callable[[str, int, int], None]) -> Any:
        progress("trace", 3, 3)
        raise errors.TraceError("nothing to build")

    monkeypatch.setattr("aot_cache.builder.pipeline.build", no_build)
    before = (logging.getLogger("aot_cache").level, list(logging.getLogger("aot_cache").handlers))
    more = ("--model", "m:r", "--target", "h200")
    assert re.search(r"^INFO aot_cache\.cli: h200: trace 3/3, \d+\.\d s$", run(*words, *more)[2], re.MULTILINE)
    assert run("build", *more)[2] == "error: nothing to build\n"
    assert "Traceback" not in run(*words, *more)[2]
    assert "Traceback" in run(*words, "-v", *more)[2]
    assert (logging.getLogger("aot_cache").level, logging.getLogger("aot_cache").handlers) == before


@pytest.mark.parametrize("words", [("-q", "build"), ("build", "-q")], ids=str)
def test_quiet_prints_errors_only(words: tuple[str, ...], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal.Progress, "FIRST", 0.0)

    def no_build(request: object, progress: Callable[[str, int, int], None]) -> Any:
        progress("trace", 1, 3)
        raise errors.TraceError("nothing to build")

    monkeypatch.setattr("aot_cache.builder.pipeline.build", no_build)
    more = ("--model", "m:r", "--target", "h200")
    assert "h200: trace 1/3, " in run("build", *more)[2]
    assert run(*words, *more)[2] == "error: nothing to build\n"
    assert not terminal.Progress.quiet


def test_a_stage_that_does_not_get_on_is_named_within_five_seconds(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert terminal.Progress.FIRST < 5
    monkeypatch.setattr(terminal.Progress, "FIRST", 0.2)
    with terminal.Progress() as progress:
        progress("graphs", 0, 12)
        until = time.monotonic() + HANGS
        while not (found := capfd.readouterr().err) and time.monotonic() < until:
            time.sleep(0.05)
    assert found.startswith("graphs 0/12, ")


# --- errors -----------------------------------------------------------------------------------------------------------


def test_an_error_says_what_was_expected_and_found() -> None:
    error = errors.DeclarationError("one target", "2 targets", "omit one")
    assert (error.message, error.expected, error.found) == (
        "expected one target, found 2 targets",
        "one target",
        "2 targets",
    )
    assert str(error) == "expected one target, found 2 targets; hint: omit one"
    sentence = errors.BundleMissing("no bundle at P", hint="build it")
    assert (sentence.message, sentence.expected, sentence.found) == ("no bundle at P", "", "")
    for one in (error, sentence):
        again = pickle.loads(pickle.dumps(one))
        assert (type(again), again.to_json()) == (type(one), one.to_json())
        assert type(one)(**one.parts()).to_json() == one.to_json()
    assert str(error.within("case 'a'")) == f"case 'a': {error}" and type(error.within("x")) is type(error)


@pytest.mark.parametrize(
    ("words", "kind", "code"),
    [
        ("inspect nowhere --json", "BundleMissing", 3),
        ("build --model no-such-model --json", "UnknownName", 3),
        ("build --frobnicate --json", "UsageError", 2),
        ("targets --json extra", "UsageError", 2),
    ],
)
def test_an_error_is_json_as_well(words: str, kind: str, code: int, run: Run) -> None:
    found, out, err = run(*words.split())
    error = json.loads(out)["error"]
    assert list(error) == ["type", "message", "expected", "found", "hint", "exit_code"]
    assert (found, error["type"], error["exit_code"]) == (code, kind, code)
    assert err == f"error: {error['message']}\nhint: {error['hint']}\n"


def test_what_was_done_before_an_error_is_in_the_same_document(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(request: object, progress: object) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(HANGS)

    monkeypatch.setattr("aot_cache.builder.pipeline.build", interrupted)
    code, out, err = run("build", "--model", "m:r", "--target", "h200", "--json")
    assert (code, json.loads(out)["error"]["exit_code"]) == (143, 143)
    assert err == "error: interrupted\nhint: run it again to continue: what is done is kept\n"


def test_the_json_of_a_recorded_program_is_its_own(run: Run) -> None:
    for words in (("record",), ("-v", "record")):
        assert run(*words, "--out", "p", "no-such-program", "--json")[:2] == (3, "")


# --- docs/reference.md ------------------------------------------------------------------------------------------------


def test_the_reference_has_every_variable() -> None:
    source = [path.read_text() for path in (ROOT / "aot_cache").rglob("*.py")]
    read = {name for text in source for name in re.findall(r"\bAOT_CACHE(?:_[A-Z]+)*\b", text)}
    table = REFERENCE.partition("## Environment variables")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)) == {
        *(f"`{name}`" for name in read),
        "`CC`, `CXX`",
        "`TMPDIR`",
        "`ORAS_USER`, `ORAS_PASS`",
        "`DOCKER_CONFIG`, `REGISTRY_AUTH_FILE`",
    }


def test_the_reference_has_every_exit_code() -> None:
    table = REFERENCE.partition("## Exit codes")[2].partition("\n## ")[0]
    codes = {value.exit_code for value in vars(errors).values() if hasattr(value, "exit_code")}
    assert set(re.findall(r"^\| (\d.*?) \|", table, re.MULTILINE)) == {"0", "1", "2", "128 + N", *map(str, codes)}


def test_the_reference_shows_what_is_printed(run: Run) -> None:
    _, out, err = run("inspect", "model.safetensors", "--json")
    assert f"```text\n{err}```" in REFERENCE and f"```json\n{out}```" in REFERENCE
