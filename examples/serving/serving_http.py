"""The HTTP side of the serving example: OpenAI's completions, health, metrics and the statistics of aot-cache."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from functools import partial
from typing import TYPE_CHECKING, Any

from completions import ApiError, Choice, Completion, Head, Limits, parse, usage
from scheduler import ENDS, Engine, Output, Refused, Request, Scheduler, TooMany
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

import aot_cache

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_BODY = 8 << 20
"""Bytes. A prompt of 262144 token ids has 2 MB."""


def make_app(
    scheduler: Scheduler,
    model: str,
    tokenizer: Tokenizer | None = None,
    stop_token_ids: frozenset[int] = frozenset(),
    max_body: int = MAX_BODY,
) -> Starlette:
    """The server's application.

    Args:
        scheduler: started by the caller. Until it is ready, completions are answered with 503.
        model: the name in `/v1/models`, and the only one that a request may name.
        tokenizer: None if prompts are token ids.
        stop_token_ids: used for requests that name none.
        max_body: maximum bytes of a request's body.
    """
    ends = Endpoints(scheduler, model, tokenizer, stop_token_ids, max_body)
    routes = [
        Route("/v1/completions", ends.completions, methods=["POST"]),
        Route("/v1/models", ends.models),
        Route("/health", ends.health),
        Route("/metrics", ends.metrics),
        Route("/aot", ends.aot),
    ]
    return Starlette(routes=routes, exception_handlers={ApiError: _answer_error, ClientDisconnect: _answer_nobody})


async def _answer_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    # json.dumps, not JSONResponse: the name of an unknown field may be text that UTF-8 cannot encode.
    return Response(json.dumps(error.body), error.status, media_type="application/json")


async def _answer_nobody(request: HttpRequest, error: Exception) -> Response:
    """The client left before its body was complete."""
    return Response(status_code=400)


class Endpoints:
    """The handlers of the HTTP endpoints."""

    def __init__(
        self,
        scheduler: Scheduler,
        model: str,
        tokenizer: Tokenizer | None,
        stop_token_ids: frozenset[int],
        max_body: int,
    ) -> None:
        self.scheduler = scheduler
        self.model = model
        self.tokenizer = tokenizer
        self.stop_token_ids = stop_token_ids
        self.max_body = max_body

    async def completions(self, request: HttpRequest) -> Response:
        asked = parse(await self._body(request), self._limits(self._engine()))
        answer = Answer(self.scheduler, asked)
        if asked.stream:
            return Events(answer, self._chunks(answer))
        watch = asyncio.create_task(answer.end_when_gone(request))
        try:
            return await self._whole(answer)
        finally:
            watch.cancel()
            answer.cancel()

    async def models(self, request: HttpRequest) -> Response:
        entry = {"id": self.model, "object": "model", "owned_by": "aot-cache"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def health(self, request: HttpRequest) -> Response:
        """200 only while requests are accepted. A failed engine stays failed, see `Scheduler`."""
        state = self.scheduler.state()
        return JSONResponse({"state": state, "error": self.scheduler.error}, 200 if state == "ready" else 503)

    async def metrics(self, request: HttpRequest) -> Response:
        text = aot_cache.prometheus() + prometheus(self.scheduler)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def aot(self, request: HttpRequest) -> Response:
        return JSONResponse(aot_cache.stats())

    def _engine(self) -> Engine:
        if self.scheduler.engine is None:
            raise ApiError(503, f"the engine is {self.scheduler.state()}", kind="server_error")
        return self.scheduler.engine

    def _limits(self, engine: Engine) -> Limits:
        encode = self._encode if self.tokenizer is not None else None
        return Limits(self.model, engine.vocab, engine.max_model_len, encode, self.stop_token_ids)

    async def _body(self, request: HttpRequest) -> bytes:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self.max_body:
                raise ApiError(413, f"the body has more than {self.max_body} bytes")
        return bytes(body)

    async def _whole(self, answer: Answer) -> Response:
        choices = [Choice(index) for index in range(len(answer.requests))]
        async for index, output in answer.outputs():
            choices[index].token_ids += output.tokens
            choices[index].finish_reason = output.finish
        for choice in choices:
            choice.text = self._decode(choice)
        return JSONResponse({**Head(self.model).to_json(choices), "usage": usage(answer.asked, choices)})

    async def _chunks(self, answer: Answer) -> AsyncIterator[str]:
        head = Head(self.model)
        texts = [self._text_stream() for _ in answer.requests]
        try:
            async for index, output in answer.outputs():
                text = texts[index](_spoken(output.tokens, output.finish))
                yield _event(head.to_json([Choice(index, text, output.tokens, output.finish)]))
        except ApiError as error:  # the status line is already sent
            yield _event(error.body)
        yield "data: [DONE]\n\n"

    # --- text -------------------------------------------------------------------------------------------------------

    def _encode(self, text: str) -> list[int]:
        assert self.tokenizer is not None
        try:
            return list(self.tokenizer.encode(text).ids)
        except (TypeError, ValueError) as error:  # half of a surrogate pair
            raise ApiError(400, f"prompt is no text: {error}", "prompt") from error

    def _decode(self, choice: Choice) -> str:
        if self.tokenizer is None:
            return ""
        return str(self.tokenizer.decode(_spoken(choice.token_ids, choice.finish_reason)))

    def _text_stream(self) -> Any:
        """A function from new tokens to the text that they complete; a character's bytes may be spread over several tokens."""
        if self.tokenizer is None:
            return lambda tokens: ""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        return lambda tokens: "".join(stream.step(self.tokenizer, token) or "" for token in tokens)


def _spoken(tokens: list[int], finish: str | None) -> list[int]:
    return tokens[:-1] if finish == "stop" else tokens


def _event(data: Any) -> str:
    return f"data: {json.dumps(data)}\n\n"


class Answer:
    """The running requests of one HTTP call, one for each prompt."""

    def __init__(self, scheduler: Scheduler, asked: Completion) -> None:
        """Submit the requests.

        Raises:
            ApiError: 429 if too many requests wait, 503 if the engine accepts none.
        """
        self.asked = asked
        self._scheduler = scheduler
        self._loop = asyncio.get_running_loop()
        self._outputs: asyncio.Queue[tuple[int, Output]] = asyncio.Queue()
        self.requests = [
            Request(
                prompt,
                partial(self._deliver, index),
                asked.max_tokens,
                asked.temperature,
                asked.seed,
                asked.stop_token_ids,
            )
            for index, prompt in enumerate(asked.prompt)
        ]
        try:
            scheduler.submit(self.requests)
        except TooMany as error:
            raise ApiError(429, str(error), kind="rate_limit_error") from error
        except Refused as error:
            raise ApiError(503, str(error), kind="server_error") from error

    def _deliver(self, index: int, output: Output) -> None:
        """Called in the engine's thread."""
        self._loop.call_soon_threadsafe(self._outputs.put_nowait, (index, output))

    async def outputs(self) -> AsyncIterator[tuple[int, Output]]:
        """Yield (prompt's index, output) as they arrive, until all prompts are done.

        Raises:
            ApiError: 500 if the engine failed.
        """
        left = len(self.requests)
        while left:
            index, output = await self._outputs.get()
            if output.finish == "error":
                raise ApiError(500, output.error, kind="server_error")
            left -= output.finish is not None
            yield index, output

    def cancel(self) -> None:
        """Cancel all requests. Harmless if they have ended."""
        for request in self.requests:
            self._scheduler.cancel(request)

    async def end_when_gone(self, request: HttpRequest) -> None:
        """End `outputs` when the client disconnects. Starlette does this only for streams."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._outputs.put_nowait((0, Output([], "error", "the client has gone")))


class Events(StreamingResponse):
    """Server-sent events. Cancels its requests when the response ends; Starlette ends it when the client disconnects."""

    def __init__(self, answer: Answer, chunks: AsyncIterator[str]) -> None:
        super().__init__(chunks, media_type="text/event-stream")
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.cancel()


def prometheus(scheduler: Scheduler) -> str:
    """The scheduler's counts in Prometheus text format."""
    counts, engine = scheduler.counts, scheduler.engine
    lines = []

    def metric(name: str, kind: str, text: str, values: dict[str, int]) -> None:
        lines.extend([f"# HELP serve_{name} {text}", f"# TYPE serve_{name} {kind}"])
        lines.extend(f"serve_{name}{labels} {value}" for labels, value in values.items())

    ends = {f'{{end="{end}"}}': counts.finished[end] for end in ENDS}
    metric("requests_total", "counter", "Requests by how they ended; refused ones were never taken.", ends)
    metric("requests_running", "gauge", "Requests that have a slot.", {"": scheduler.running()})
    metric("requests_waiting", "gauge", "Requests that wait for a slot.", {"": scheduler.waiting()})
    metric("prompt_tokens_total", "counter", "Tokens of prompts.", {"": counts.prompt_tokens})
    metric("tokens_total", "counter", "Tokens that were delivered.", {"": counts.tokens})
    metric("draft_tokens_total", "counter", "Draft tokens that were proposed.", {"": counts.drafts})
    drafts = range(engine.speculative + 1 if engine is not None else 1)
    accepted = {f'{{accepted="{number}"}}': counts.accepted[number] for number in drafts}
    metric("steps_total", "counter", "Steps of requests by the number of drafts that were accepted.", accepted)
    return "\n".join([*lines, ""])
