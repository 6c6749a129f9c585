"""`examples/serving/serve.py` as a process: its start, clients that go, SIGTERM."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import httpx
import pytest
import serve
from fake_engine import SECONDS, expected, wait_until
from limits import HANGS

HERE = Path(__file__).parent
PATHS = os.pathsep.join(map(str, [HERE.parent, HERE.parent / "examples" / "serving", HERE]))
LONG = 10**6
STAGES = ["imported", "weights", "bundle", "captured", "ready"]
Json = Any


class Process:
    """A running server. `fake`: see serve_child.py."""

    def __init__(self, *arguments: str, **fake: Json) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AOT_CACHE")}
        environment |= {"PYTHONPATH": PATHS, "FAKE_ENGINE": json.dumps(fake)}
        command = [
            sys.executable,
            str(HERE / "serve_child.py"),
            "--port",
            "0",
            "--max-model-len",
            str(LONG),
            *arguments,
        ]
        self.popen = subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert self.popen.stdout and self.popen.stderr
        self.stdout: IO[str] = self.popen.stdout
        self.stderr: IO[str] = self.popen.stderr
        self.client = httpx.Client(base_url=self.stdout.readline().strip(), timeout=SECONDS)

    def ready(self) -> Process:
        wait_until(lambda: self.client.get("/health").status_code == 200)
        return self

    def metric(self, name: str) -> int:
        lines = self.client.get("/metrics").text.splitlines()
        return next(int(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} "))

    def stream(self, **asked: Json) -> Any:
        return self.client.stream("POST", "/v1/completions", json={"prompt": [1], "seed": 0, "stream": True, **asked})

    def end(self) -> tuple[int, str, str]:
        """Exit status, and the rest of what it said. Not `communicate`, which loses what readline has read ahead."""
        return self.popen.wait(SECONDS), self.stdout.read(), self.stderr.read()

    def close(self) -> None:
        self.client.close()
        with self.popen:  # closes the pipes
            self.popen.kill()


@pytest.fixture
def serving() -> Iterator[Callable[..., Process]]:
    processes: list[Process] = []

    def start(*arguments: str, **fake: Json) -> Process:
        processes.append(Process(*arguments, **fake))
        return processes[-1]

    yield start
    for process in processes:
        process.close()


def data(lines: Iterator[str]) -> Iterator[Json]:
    """Events, without the [DONE] that must be the last."""
    for line in lines:
        if line == "data: [DONE]":
            assert not "".join(lines)
            return
        if line:
            yield json.loads(line.removeprefix("data: "))
    raise AssertionError("the stream broke off")


def token_ids(found: list[Json]) -> list[int]:
    return [token for event in found for token in event["choices"][0]["token_ids"]]


def test_a_start_is_shown_beside_an_earlier_one(serving: Callable[..., Process], tmp_path: Path) -> None:
    file = tmp_path / "start.json"
    first = serving("--record", str(file), "--no-speculation", "--layers", "2").ready()
    options = json.loads(first.stdout.readline())
    assert options == {"drafts": 2, "speculate": False, "layers": 2}
    first.popen.send_signal(signal.SIGTERM)
    assert first.end()[1].splitlines()[0].split() == ["no", "bundle"]
    record = json.loads(file.read_text())
    assert list(record["seconds"]) == STAGES
    assert list(record["seconds"].values()) == sorted(record["seconds"].values())
    assert record["events"] == {"misses": 0}
    file.write_text(json.dumps({**record, "name": "the other", "events": {"compile": 57, "misses": 12}}))
    second = serving("--compare", str(file)).ready()
    second.popen.send_signal(signal.SIGTERM)
    lines = [line.split() for line in second.end()[1].splitlines()[1:]]
    assert lines[0] == ["no", "bundle", "the", "other"]
    assert [line[0] for line in lines[1:6]] == STAGES
    assert sorted(lines[6:]) == [["compile", "0", "57"], ["misses", "0", "12"]]


@pytest.mark.parametrize("content", ['{"seconds": {}}', "3", "{"])
def test_a_file_that_is_no_record_of_a_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    file = tmp_path / "start.json"
    file.write_text(content)
    monkeypatch.setattr(sys, "argv", ["serve.py", "--compare", str(file)])
    with pytest.raises(SystemExit, match="2"):
        serve.main()
    assert f"{file} is no record of a start" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, set()),
        ({"config.json": {"eos_token_id": 3}}, {3}),
        ({"config.json": {"eos_token_id": 3}, "generation_config.json": {"eos_token_id": [1, 2]}}, {1, 2}),
        ({"config.json": {"eos_token_id": 0}, "generation_config.json": {"eos_token_id": None}}, {0}),
    ],
)
def test_the_tokens_that_end_a_text(tmp_path: Path, files: dict[str, Json], ends: set[int]) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert serve.end_of_text(None, tmp_path) == ends


def test_health_answers_while_the_engine_is_made(serving: Callable[..., Process], tmp_path: Path) -> None:
    process = serving(waits_for=str(tmp_path / "go"))
    health = process.client.get("/health")
    assert (health.status_code, health.json()["state"]) == (503, "starting")
    (tmp_path / "go").touch()
    process.ready()
    assert process.client.get("/aot").json()["sealed"] is True


def test_a_start_that_fails_ends_the_process_and_says_why(serving: Callable[..., Process]) -> None:
    status, out, err = serving(fails="no such weights").end()
    assert status == 1
    assert err.count("RuntimeError: no such weights") == 1
    assert "misses" not in out


def test_what_was_not_captured_is_said(serving: Callable[..., Process]) -> None:
    dropped = {"shape": 8, "action": "dropped", "why": "not everything that it needs is installed"}
    process = serving(captures=[dropped]).ready()
    process.popen.send_signal(signal.SIGTERM)
    assert process.end()[2] == "decode, batch 8: dropped, not everything that it needs is installed\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "qwen3.5-3b"], "unknown model 'qwen3.5-3b'"),
        (["--model", "nowhere/config.json"], "cannot read config file nowhere/config.json"),
    ],
)
def test_a_model_that_there_is_not_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["serve.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        serve.main()
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_only_what_is_given_is_no_default_of_the_recipe() -> None:
    parse = serve.make_parser().parse_args
    assert serve.spec_of(parse([])) == "qwen3.5"
    given = parse(["--model", "qwen3.5-4b", "--spec", "mtp", "--max-batch", "8", "--prefill-chunk", "64"])
    assert serve.spec_of(given) == "qwen3.5-4b?max_batch=8&prefill_chunk=64&spec=mtp"


def test_a_stream_and_a_whole_answer(serving: Callable[..., Process]) -> None:
    process = serving().ready()
    wanted, finish = expected([1], 30, (), LONG, 50)
    with process.stream(max_tokens=30) as answer:
        found = list(data(answer.iter_lines()))
    assert token_ids(found) == wanted and found[-1]["choices"][0]["finish_reason"] == finish
    whole = process.client.post("/v1/completions", json={"prompt": [1], "seed": 0, "max_tokens": 30})
    assert whole.json()["choices"][0]["token_ids"] == wanted


def test_ctrl_c_is_no_traceback(serving: Callable[..., Process]) -> None:
    process = serving().ready()
    process.popen.send_signal(signal.SIGINT)
    status, _, err = process.end()
    assert (status, err) == (0, "")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_slot(serving: Callable[..., Process], stream: bool) -> None:
    process = serving("--max-batch", "1", seconds=0.01).ready()
    body = json.dumps({"prompt": [1], "max_tokens": LONG, "stream": stream}).encode()
    with socket.create_connection((process.client.base_url.host, process.client.base_url.port or 0)) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        wait_until(lambda: process.metric("serve_requests_running") == 1)
    # Neither would end within this test's time if the first still had the slot.
    assert process.client.post("/v1/completions", json={"prompt": [2], "max_tokens": 3}).status_code == 200
    wait_until(lambda: process.metric('serve_requests_total{end="cancelled"}') == 1)


def test_sigterm_lets_running_requests_finish(serving: Callable[..., Process]) -> None:
    process = serving(seconds=0.01).ready()
    with process.stream(max_tokens=100) as answer:
        events = data(answer.iter_lines())
        found = [next(events)]
        process.popen.send_signal(signal.SIGTERM)
        found += events
    assert token_ids(found) == expected([1], 100, (), LONG, 50)[0]
    status, _, err = process.end()
    assert status == 0  # whoever sent it asked for just that: a supervisor must not take it for a crash
    assert not err
    with pytest.raises(httpx.ConnectError):
        process.client.get("/health")


def test_sigterm_ends_what_takes_too_long_with_an_error(serving: Callable[..., Process]) -> None:
    process = serving("--drain", "0.2", seconds=0.01).ready()
    with process.stream(max_tokens=LONG) as answer:
        events = data(answer.iter_lines())
        next(events)
        process.popen.send_signal(signal.SIGTERM)
        *_, last = events
    assert last["error"]["message"] == "the server is stopping"
    status, _, err = process.end()
    assert (status, err) == (0, "")


@pytest.mark.parametrize("call", ["start", "step"])
def test_sigterm_ends_streams_while_the_engine_is_in_a_call(serving: Callable[..., Process], call: str) -> None:
    """Under overload a step takes longer than anybody waits: one has its slot, the other is still in the queue."""
    process = serving("--drain", "0.2", "--max-batch", "1", stuck_in=call).ready()
    with process.stream(max_tokens=9) as running, process.stream(max_tokens=9) as waiting:
        process.popen.send_signal(signal.SIGTERM)
        for answer in (running, waiting):
            *_, last = data(answer.iter_lines())
            assert last["error"]["message"] == "the server is stopping"
    status, _, err = process.end()
    assert (status, err) == (0, "")


def test_a_soak_of_some_seconds(tmp_path: Path) -> None:
    """As `tools/soak` does it for ten minutes with a real model: slow readers, clients that go, a queue that is full, SIGTERM."""
    command = [sys.executable, str(HERE.parent / "tools" / "soak"), "--server", str(HERE / "serve_child.py")]
    command += ["--seconds", "4", "--clients", "16", "--out", str(tmp_path / "record.json")]
    command += ["--", "--max-batch", "4", "--max-model-len", "64", "--max-waiting", "8"]
    environment = {**os.environ, "PYTHONPATH": PATHS, "FAKE_ENGINE": json.dumps({"seconds": 0.01})}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGS, check=False)
    record = json.loads((tmp_path / "record.json").read_text())
    claims = {claim: holds for claim, holds in record["claims"].items() if "memory" not in claim}  # too short for that
    assert claims and all(claims.values()), (record, done.stderr)
    assert min(record["outcomes"].get(end, 0) for end in ("ended", "whole", "gone", "429")) > 0
    assert record["sigterm"]["open_streams"] > 0
