"""The JSON of `POST /v1/completions`: requests, checked field by field, and answers, in OpenAI's form."""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Json = Any


class ApiError(Exception):
    """An answer with a status other than 200."""

    def __init__(
        self, status: int, message: str, param: str | None = None, kind: str = "invalid_request_error"
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body: Json = {"error": {"message": message, "type": kind, "param": param, "code": None}}


@dataclass(frozen=True)
class Limits:
    """The limits of the engine behind the server."""

    model: str
    vocab: int
    max_model_len: int
    encode: Callable[[str], list[int]] | None
    """Converts text to tokens; None without a tokenizer."""
    stop_token_ids: frozenset[int] = frozenset()
    """Used if a request names none: the model's end-of-text tokens."""


@dataclass(frozen=True)
class Completion:
    """A checked request. Defaults are OpenAI's."""

    prompt: list[list[int]]
    """Token ids. Each prompt becomes one choice of the answer."""
    stop_token_ids: frozenset[int]
    max_tokens: int = 16
    temperature: float = 1.0
    seed: int = field(default_factory=lambda: secrets.randbelow(2**31))
    stream: bool = False


def parse(body: bytes, limits: Limits) -> Completion:
    """Parse and check the body of a request.

    Raises:
        ApiError: 400 for a field that is wrong or unknown; 404 for another model.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    if not isinstance(asked, dict):
        raise ApiError(400, "the body must be a JSON object")
    fields: dict[str, Any] = {"stop_token_ids": limits.stop_token_ids}
    for name, value in asked.items():
        if name not in FIELDS:
            raise ApiError(400, f"{_short(name)} is not supported; there are {', '.join(FIELDS)}", name)
        if value is not None:  # as in OpenAI's API, null means the default
            fields[name] = FIELDS[name](name, value, limits)
    if "prompt" not in fields:
        raise ApiError(400, "prompt is missing", "prompt")
    return Completion(**{name: value for name, value in fields.items() if name not in ("model", "n")})


def _integer(name: str, value: Json, least: int, most: int) -> int:
    # In Python bool is an int; and 3.0 is not accepted as a token.
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ApiError(400, f"{name} must be an integer from {least} to {most}, not {_short(value)}", name)
    return value


def _token_ids(name: str, value: list[Json], limits: Limits) -> list[int]:
    return [_integer(name, token, 0, limits.vocab - 1) for token in value]


def _prompt(name: str, value: Json, limits: Limits) -> list[list[int]]:
    if isinstance(value, str) and limits.encode is None:
        raise ApiError(400, "this server has no tokenizer: prompt must be a list of token ids", name)
    if isinstance(value, str) and limits.encode is not None:
        prompts = [limits.encode(value)]
    elif isinstance(value, list) and value and all(isinstance(one, list) for one in value):
        prompts = [_token_ids(name, one, limits) for one in value]
    elif isinstance(value, list):
        prompts = [_token_ids(name, value, limits)]
    else:
        raise ApiError(400, f"{name} must be a list of token ids, or a list of such lists, not {_short(value)}", name)
    for one in prompts:
        if not 1 <= len(one) < limits.max_model_len:
            most = limits.max_model_len - 1
            raise ApiError(400, f"{name} must have 1 to {most} tokens, not {len(one)}", name)
    return prompts


def _max_tokens(name: str, value: Json, limits: Limits) -> int:
    return _integer(name, value, 1, 2**31 - 1)  # above max_model_len, the answer ends at max_model_len


def _temperature(name: str, value: Json, limits: Limits) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= sys.float_info.max:
        raise ApiError(400, f"{name} must be a number, 0 or more, not {_short(value)}", name)
    return float(value)


def _seed(name: str, value: Json, limits: Limits) -> int:
    return _integer(name, value, 0, 2**63 - 1)


def _stop_token_ids(name: str, value: Json, limits: Limits) -> frozenset[int]:
    if not isinstance(value, list):
        raise ApiError(400, f"{name} must be a list of token ids, not {_short(value)}", name)
    return frozenset(_token_ids(name, value, limits))


def _stream(name: str, value: Json, limits: Limits) -> bool:
    if not isinstance(value, bool):
        raise ApiError(400, f"{name} must be true or false, not {_short(value)}", name)
    return value


def _n(name: str, value: Json, limits: Limits) -> int:
    if value != 1 or isinstance(value, bool):
        raise ApiError(400, f"n must be 1, not {_short(value)}: give the prompt several times instead", name)
    return 1


def _model(name: str, value: Json, limits: Limits) -> str:
    if value != limits.model:
        raise ApiError(404, f"there is no model {_short(value)} here, only {limits.model!r}", name)
    return limits.model


def _short(value: Json) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


FIELDS: dict[str, Callable[[str, Json, Limits], Any]] = {
    "model": _model,
    "prompt": _prompt,
    "max_tokens": _max_tokens,
    "temperature": _temperature,
    "seed": _seed,
    "stop_token_ids": _stop_token_ids,
    "n": _n,
    "stream": _stream,
}


# --- answers ----------------------------------------------------------------------------------------------------------


@dataclass
class Choice:
    """The answer to one prompt, or in a stream a part of it."""

    index: int
    text: str = ""
    """Empty if the server has no tokenizer. Stop tokens have no text."""
    token_ids: list[int] = field(default_factory=list)
    """All tokens, including the stop token."""
    finish_reason: str | None = None


@dataclass(frozen=True)
class Head:
    """The fields that all parts of one answer share."""

    model: str
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def to_json(self, choices: list[Choice]) -> Json:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [vars(choice) for choice in choices],
        }


def usage(completion: Completion, choices: list[Choice]) -> Json:
    prompt = sum(len(one) for one in completion.prompt)
    answer = sum(len(choice.token_ids) for choice in choices)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
