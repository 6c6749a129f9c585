"""The serving example's HTTP, against the application itself: answers, refusals, metrics."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import httpx
import pytest
from fake_engine import SECONDS, FakeEngine, ended, expected, started, wait_until
from hypothesis import given
from hypothesis import strategies as st
from scheduler import ENDS, Scheduler
from serving_http import make_app

import aot_cache

MODEL = "fake-1b"
VOCAB, MOST = 50, 64
Json = Any


class Serving:
    """An application over a fake engine, and a client for it."""

    def __init__(
        self,
        engine: FakeEngine | None = None,
        max_waiting: int = 8,
        scheduler: Scheduler | None = None,
        **options: Any,
    ) -> None:
        self.engine = engine or FakeEngine(vocab=VOCAB, max_model_len=MOST)
        self.scheduler = scheduler or started(self.engine, max_waiting=max_waiting)
        self.app = make_app(self.scheduler, MODEL, **options)

    def ask(self, body: Json) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request("POST", "/v1/completions", content=content)

    def get(self, path: str) -> httpx.Response:
        return self.request("GET", path)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        answer: httpx.Response = self.run(lambda client: client.request(method, path, **options))
        return answer

    def run(self, work: Callable[[httpx.AsyncClient], Coroutine[Any, Any, Any]]) -> Any:
        async def inside() -> Any:
            transport = httpx.ASGITransport(app=self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://here", timeout=SECONDS) as client:
                return await asyncio.wait_for(work(client), SECONDS)

        return asyncio.run(inside())


@pytest.fixture(scope="module")
def serving() -> Iterator[Serving]:
    serving = Serving()
    yield serving
    assert not serving.scheduler.error and not serving.engine.slots
    ended(serving.scheduler)


def tokens(prompt: list[int], max_tokens: int = 16, stop: tuple[int, ...] = (), seed: int = 0) -> tuple[list[int], str]:
    return expected(prompt, max_tokens, stop, MOST, VOCAB, seed)


def events(text: str) -> list[Json]:
    """The data of a stream of events; its last is [DONE]."""
    found = [part.removeprefix("data: ") for part in text.split("\n\n") if part]
    assert found.pop() == "[DONE]"
    return [json.loads(part) for part in found]


# --- answers ----------------------------------------------------------------------------------------------------------


def test_a_completion(serving: Serving) -> None:
    answer = serving.ask({"model": MODEL, "prompt": [1, 2, 3], "max_tokens": 5, "seed": 7})
    assert answer.status_code == 200
    body = answer.json()
    assert body.keys() == {"id", "object", "created", "model", "choices", "usage"}
    assert body["id"].startswith("cmpl-") and (body["object"], body["model"]) == ("text_completion", MODEL)
    wanted, finish = tokens([1, 2, 3], 5, seed=7)
    assert body["choices"] == [{"index": 0, "text": "", "token_ids": wanted, "finish_reason": finish}]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}


def test_several_prompts_are_choices_in_their_order(serving: Serving) -> None:
    prompts = [[n, n + 1] for n in range(7)]
    body = serving.ask({"prompt": prompts, "seed": 1, "max_tokens": 9}).json()
    assert [choice["index"] for choice in body["choices"]] == list(range(7))
    assert [choice["token_ids"] for choice in body["choices"]] == [tokens(one, 9, seed=1)[0] for one in prompts]
    assert body["usage"]["total_tokens"] == 7 * (2 + 9)


def test_a_stream_has_the_same_tokens(serving: Serving) -> None:
    prompts = [[3], [4, 5]]
    answer = serving.ask({"prompt": prompts, "seed": 2, "max_tokens": 12, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = events(answer.text)
    assert len({event["id"] for event in found}) == 1
    for index, prompt in enumerate(prompts):
        parts = [event["choices"][0] for event in found if event["choices"][0]["index"] == index]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]
        assert [token for part in parts for token in part["token_ids"]] == tokens(prompt, 12, seed=2)[0]


def test_a_stop_token_is_the_last(serving: Serving) -> None:
    stop = tokens([9], 8)[0][4]
    choice = serving.ask({"prompt": [9], "seed": 0, "max_tokens": 8, "stop_token_ids": [stop]}).json()["choices"][0]
    assert (choice["token_ids"], choice["finish_reason"]) == tokens([9], 8, (stop,))
    assert choice["finish_reason"] == "stop"


def test_an_answer_ends_where_the_model_does(serving: Serving) -> None:
    choice = serving.ask({"prompt": [1] * 60, "max_tokens": 1000}).json()["choices"][0]
    assert len(choice["token_ids"]) == MOST - 60 and choice["finish_reason"] == "length"


def test_without_a_seed_two_answers_differ(serving: Serving) -> None:
    first, second = (serving.ask({"prompt": [1], "max_tokens": 40, "seed": None}).json() for _ in range(2))
    assert first["choices"] != second["choices"] and first["id"] != second["id"]


def test_the_models_end_of_text_stops_who_names_no_other() -> None:
    end = tokens([9], 8)[0][4]
    serving = Serving(stop_token_ids=frozenset([end]))
    asked = {"prompt": [9], "seed": 0, "max_tokens": 8}
    assert serving.ask(asked).json()["choices"][0]["finish_reason"] == "stop"
    assert serving.ask({**asked, "stop_token_ids": []}).json()["choices"][0]["finish_reason"] == "length"
    ended(serving.scheduler)


# --- text -------------------------------------------------------------------------------------------------------------


def byte_tokenizer() -> Any:
    """A token for each byte: characters of several tokens are common."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: n for n, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_text_in_and_text_out() -> None:
    tokenizer = byte_tokenizer()

    class Echo(FakeEngine):
        """Says a word of many bytes."""

        def start(self, slot: int, prompt: Any, temperature: float = 0.0, seed: int = 0) -> int:
            super().start(slot, prompt, temperature, seed)
            self.slots[slot] = iter(tokenizer.encode("grün → 🦆.").ids * 99)
            return next(self.slots[slot])

    serving = Serving(Echo(vocab=256, max_model_len=MOST), tokenizer=tokenizer)
    full_stop = tokenizer.encode(".").ids
    asked = {"prompt": "Wie sieht die Ente aus?", "stop_token_ids": full_stop}
    body = serving.ask(asked).json()
    assert serving.engine.prompts == [tokenizer.encode(asked["prompt"]).ids]
    assert body["choices"][0]["text"] == "grün → 🦆" and body["choices"][0]["token_ids"][-1:] == full_stop
    parts = [event["choices"][0]["text"] for event in events(serving.ask({**asked, "stream": True}).text)]
    assert "".join(parts) == "grün → 🦆"
    assert serving.ask(b'{"prompt": "\\ud800"}').json()["error"]["param"] == "prompt"
    ended(serving.scheduler)


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(answer: httpx.Response, status: int, param: str | None, *words: str) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param
    for word in words:
        assert word in error["message"]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("prompt", "text", ["no tokenizer", "token ids"]),
        ("prompt", [], ["1 to 63 tokens, not 0"]),
        ("prompt", [[]], ["1 to 63 tokens, not 0"]),
        ("prompt", [[1], []], ["not 0"]),
        ("prompt", [1] * 64, ["not 64"]),
        ("prompt", [VOCAB], ["from 0 to 49", "50"]),
        ("prompt", [-1], ["-1"]),
        ("prompt", [1.0], ["1.0"]),
        ("prompt", [True], ["true"]),
        ("prompt", [[1], 2], ["[1]"]),
        ("prompt", {}, ["list of token ids"]),
        ("prompt", None, ["missing"]),
        ("max_tokens", 0, ["from 1"]),
        ("max_tokens", "5", ["integer"]),
        ("temperature", -0.1, ["0 or more"]),
        ("temperature", float("nan"), ["NaN"]),
        ("temperature", float("inf"), ["Infinity"]),
        ("temperature", 10**400, ["0 or more"]),
        ("temperature", True, ["true"]),
        ("seed", -1, ["from 0"]),
        ("seed", 2**63, ["to 9223372036854775807"]),
        ("stop_token_ids", 3, ["list of token ids"]),
        ("stop_token_ids", [99], ["99"]),
        ("n", 2, ["n must be 1"]),
        ("n", True, ["n must be 1"]),
        ("stream", 1, ["true or false"]),
        ("top_p", 0.9, ["not supported", "temperature"]),
        ("\ud800", 0, ["not supported"]),
    ],
)
def test_a_wrong_field_is_named(serving: Serving, field: str, value: Json, words: list[str]) -> None:
    refused(serving.ask({"prompt": [1], field: value}), 400, field, *words)


def test_another_model_is_not_here(serving: Serving) -> None:
    refused(serving.ask({"model": "gpt", "prompt": [1]}), 404, "model", MODEL)


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"3", b"\xff", b"[" * 100_000, b"9" * 5000])
def test_what_is_no_json_object(serving: Serving, body: bytes) -> None:
    refused(serving.ask(body), 400, None)


@given(
    body=st.dictionaries(
        st.sampled_from(["prompt", "max_tokens", "temperature", "seed", "stop_token_ids", "n", "stream", "model", "x"]),
        st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=5),
    )
)
def test_no_body_is_an_error_of_the_server(serving: Serving, body: Json) -> None:
    answer = serving.ask(body)
    assert answer.status_code in (200, 400, 404, 429), answer.text
    assert answer.status_code == 200 or answer.json()["error"]["message"]


def test_a_body_over_the_limit() -> None:
    serving = Serving(max_body=100)
    whole = json.dumps({"prompt": [1]}).encode()
    assert serving.ask(whole + b" " * (100 - len(whole))).status_code == 200
    refused(serving.ask(whole + b" " * (101 - len(whole))), 413, None, "100 bytes")
    ended(serving.scheduler)


def test_too_many_waiting() -> None:
    gate = threading.Event()
    engine = FakeEngine(max_batch=1, vocab=VOCAB, before=lambda call: gate.wait(SECONDS))
    serving = Serving(engine, max_waiting=1)

    async def crowd(client: httpx.AsyncClient) -> list[httpx.Response]:
        async def ask() -> httpx.Response:
            return await client.post("/v1/completions", json={"prompt": [1], "max_tokens": 2})

        first = asyncio.create_task(ask())
        await asyncio.to_thread(wait_until, lambda: serving.scheduler.running() == 1)
        second = asyncio.create_task(ask())
        await asyncio.to_thread(wait_until, lambda: serving.scheduler.waiting() == 1)
        third = await ask()
        gate.set()
        return [await first, await second, third]

    first, second, third = serving.run(crowd)
    assert (first.status_code, second.status_code) == (200, 200)
    refused(third, 429, None, "at most 1 may")
    assert third.json()["error"]["type"] == "rate_limit_error"
    ended(serving.scheduler)


def test_a_stream_that_is_refused_has_its_status(serving: Serving) -> None:
    refused(serving.ask({"prompt": [[1]] * 9, "stream": True}), 429, None, "at most 8 may")


# --- health, and when the engine fails --------------------------------------------------------------------------------


def test_health_and_completions_before_the_engine_is_there() -> None:
    gate = threading.Event()

    def make() -> FakeEngine:
        gate.wait(SECONDS)
        return FakeEngine()

    serving = Serving(scheduler=Scheduler(make))
    serving.scheduler.start()
    health = serving.get("/health")
    assert (health.status_code, health.json()) == (503, {"state": "starting", "error": ""})
    refused(serving.ask({"prompt": [1]}), 503, None, "starting")
    assert serving.get("/metrics").status_code == serving.get("/aot").status_code == 200
    gate.set()
    wait_until(lambda: serving.get("/health").status_code == 200)
    assert serving.ask({"prompt": [1]}).status_code == 200
    ended(serving.scheduler)
    assert serving.get("/health").json()["state"] == "stopping"


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails(stream: bool) -> None:
    def before(call: str) -> None:
        if call == "step":
            raise RuntimeError("an illegal memory access")

    serving = Serving(FakeEngine(vocab=VOCAB, before=before))
    answer = serving.ask({"prompt": [1], "stream": stream})
    if stream:
        assert answer.status_code == 200  # the first token was there
        assert "an illegal memory access" in events(answer.text)[-1]["error"]["message"]
    else:
        refused(answer, 500, None, "an illegal memory access")
    health = serving.get("/health")
    assert health.status_code == 503 and health.json()["state"] == "failed"
    refused(serving.ask({"prompt": [1]}), 503, None, "an illegal memory access")
    assert samples(serving)['serve_requests_total{end="error"}'] == 1


# --- models, metrics, aot ---------------------------------------------------------------------------------------------


def test_the_models(serving: Serving) -> None:
    assert serving.get("/v1/models").json() == {
        "object": "list",
        "data": [{"id": MODEL, "object": "model", "owned_by": "aot-cache"}],
    }


def test_what_aot_cache_did(serving: Serving) -> None:
    assert serving.get("/aot").json() == json.loads(json.dumps(aot_cache.stats()))


SAMPLE = re.compile(r'([a-z_]+)(\{[a-z_]+="[^"]*"\})? (\d+)')


def samples(serving: Serving) -> dict[str, int]:
    """Prometheus's text format, as strictly as we use it: each sample once, after its HELP and TYPE."""
    answer = serving.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert answer.text.endswith("\n")
    said: dict[str, set[str]] = {"HELP": set(), "TYPE": set()}
    found: dict[str, int] = {}
    for line in answer.text.splitlines():
        if line.startswith("#"):
            _, what, name, text = line.split(" ", 3)
            assert name not in said[what] and (what == "HELP" or text in ("counter", "gauge"))
            said[what].add(name)
            continue
        match = SAMPLE.fullmatch(line)
        assert match, line
        assert match[1] in said["HELP"] & said["TYPE"]
        assert (match[1] + (match[2] or "")) not in found
        found[match[1] + (match[2] or "")] = int(match[3])
    return found


def test_the_metrics_count() -> None:
    engine = FakeEngine(vocab=VOCAB, max_model_len=MOST, speculative=3)
    serving = Serving(engine)
    # The ledger is the process's, and counts what other tests did in it.
    assert {count for name, count in samples(serving).items() if not name.startswith("aot_cache_")} == {0}
    serving.ask({"prompt": [[1, 2], [3]], "max_tokens": 10, "stop_token_ids": []})
    assert serving.ask({"prompt": [[1]] * 9}).status_code == 429
    ended(serving.scheduler)  # an answer is sent before it is counted
    found = samples(serving)
    ends = {end: found[f'serve_requests_total{{end="{end}"}}'] for end in ENDS}
    assert ends == {"stop": 0, "length": 2, "error": 0, "cancelled": 0, "refused": 9}
    assert (found["serve_prompt_tokens_total"], found["serve_tokens_total"]) == (3, 20)
    assert (found["serve_requests_running"], found["serve_requests_waiting"]) == (0, 0)
    accepted = [found[f'serve_steps_total{{accepted="{n}"}}'] for n in range(4)]
    assert accepted == [engine.accepted.count(n) for n in range(4)] and sum(accepted) > 0
    assert found["serve_draft_tokens_total"] == 3 * sum(accepted)
    assert "aot_cache_sealed" in found and 'aot_cache_events_total{kind="compile"}' in found
