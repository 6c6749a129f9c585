#!/usr/bin/env python3
"""Serve Qwen3.5 with captured graphs and speculative decoding, over OpenAI's completions: the example to copy from.

    aot-cache build --model qwen3.5 --spec mtp --target h200
    AOT_CACHE=BUNDLE python examples/serving/serve.py --model qwen3.5 --spec mtp --weights FOLDER --tokenizer FOLDER
    curl localhost:8000/v1/completions -d '{"prompt": "The capital of France is", "max_tokens": 8}'

Options of the model are those of `aot-cache build`, with the same defaults: give the same ones to both.

aot-cache has three lines in it: `import aot_cache.auto` below, and in `start_engine` `aot_cache.ready()` before the first
capture and `aot_cache.seal()` after the last. The rest is any server: `scheduler.py` batches, `serving_http.py` answers.
Stops at SIGTERM, with exit code 0: what runs may finish for --drain seconds. One GPU: a model that is split over ranks has to
be given its requests on all of them, which is not in this example.
"""

from __future__ import annotations

# isort: off
import start_report  # starts the clock
import aot_cache.auto  # before the model: loads the bundle that AOT_CACHE names

# isort: on
import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import uvicorn
from scheduler import Engine, Scheduler
from serving_http import make_app

from aot_cache.errors import AotCacheError
from aot_cache.recipes import declare as declaring
from aot_cache.recipes import from_config

GRACE = 5.0
"""Seconds after --drain in which the last answers are sent, and then as many for the engine's last step."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="qwen3.5", help="as `aot-cache build` takes it; also its name for clients")
    add("--spec", metavar="METHOD", help="`mtp`: drafts by the model's own layer; `none`")
    add("--num-speculative-tokens", type=int, metavar="N", help="drafts a step")
    add("--max-batch", type=int, metavar="N", help="requests at once")
    add("--max-model-len", type=int, metavar="N", help="tokens of a prompt and its answer")
    add("--prefill-chunk", type=int, metavar="N", help="tokens of a prompt that are taken in at once")
    add("--dtype", metavar="NAME", help="of weights and activations")
    add("--no-speculation", action="store_true", help="decode token by token, with the bundle for --spec mtp")
    add("--weights", type=Path, metavar="FOLDER", help="safetensors; without them the weights are random")
    add("--tokenizer", type=Path, metavar="FOLDER", help="with tokenizer.json; without it prompts are token ids")
    add("--layers", type=int, metavar="N", help="only so many of the model's layers, a multiple of 4, for trials")
    add("--device", default="cuda")
    add("--max-waiting", type=int, default=256, metavar="N", help="more requests than these in the queue get a 429")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000, help="0: any that is free; it is printed")
    add("--drain", type=float, default=30.0, metavar="SECONDS", help="for running requests, at SIGTERM")
    add("--record", type=Path, metavar="FILE", help="write what this start took")
    add("--compare", type=Path, metavar="FILE", help="print beside it what an earlier one took")
    return parser


RECIPE = ("spec", "num_speculative_tokens", "max_batch", "max_model_len", "prefill_chunk", "dtype")
"""Options of the recipe, which also has their defaults."""


def spec_of(options: argparse.Namespace) -> str:
    """The model with the given options of the recipe, in the form of `aot-cache build --model`.

    Raises:
        AotCacheError: the model is unknown.
    """
    given = {name: str(getattr(options, name)) for name in RECIPE if getattr(options, name) is not None}
    spec = from_config.spec_of(options.model, given)
    declaring.resolve(spec)
    return spec


def start_engine(options: argparse.Namespace, clock: start_report.Clock) -> Engine:
    from aot_cache.models.qwen3_5 import check_bundle
    from aot_cache.models.qwen3_5.engine import make_engine

    clock.mark("imported")
    spec = spec_of(options)
    settings = declaring.load(spec).settings
    folder, speculate = str(options.weights or ""), not options.no_speculation
    engine = make_engine(settings, options.device, folder, options.layers, speculate=speculate)
    clock.mark("weights")
    aot_cache.ready()  # install the whole bundle and load it onto the device
    check_bundle.check(spec, strict=os.environ.get("AOT_CACHE_STRICT") == "1")
    clock.mark("bundle")
    for part, sizes in engine.capture().items():
        for one in sizes:
            if one["action"] != "captured":  # steps of this size run without a graph
                print(f"{part}, batch {one['shape']}: {one['action']}, {one['why']}", file=sys.stderr, flush=True)
    clock.mark("captured")
    aot_cache.seal()  # from now on each compile, tuning or load counts as a miss
    clock.mark("ready")
    return engine


def report(options: argparse.Namespace, clock: start_report.Clock, earlier: Any) -> None:
    now = start_report.record(clock, aot_cache.stats())
    if options.record:
        options.record.write_text(json.dumps(now, indent=1) + "\n")
    print(start_report.table(now, earlier), flush=True)


def end_of_text(*folders: Path | None) -> frozenset[int]:
    """The tokens that end an answer, from the first of a model's usual config files that has them."""
    for path in (folder / name for folder in folders if folder for name in ("generation_config.json", "config.json")):
        found = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        if found is not None:
            return frozenset(found if isinstance(found, list) else [found])
    return frozenset()


class Server(uvicorn.Server):
    """At SIGTERM uvicorn stops accepting connections and waits for running answers; this tells the scheduler to finish them."""

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler, drain: float) -> None:
        super().__init__(config)
        self._scheduler = scheduler
        self._drain = drain

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._scheduler.drain(self._drain)
        # A step may take longer than uvicorn waits, which would then cut all streams.
        late = asyncio.get_running_loop().call_later(self._drain, self._scheduler.give_up)
        await super().shutdown(sockets)
        late.cancel()
        await asyncio.to_thread(self._scheduler.join, GRACE)

    def stop(self, *_: object) -> None:
        """SIGTERM while uvicorn does not listen to it: before its start, and when it raises the signal again after its end."""
        self.should_exit = True


def main() -> int:
    parser = make_parser()
    options = parser.parse_args()
    try:
        earlier = start_report.read(options.compare) if options.compare else None
        stop = end_of_text(options.weights, options.tokenizer)
        spec_of(options)  # report an unknown model before the imports, which take seconds
    except (OSError, ValueError, AotCacheError) as error:
        parser.error(str(error))
    tokenizer = None
    if options.tokenizer:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(options.tokenizer / "tokenizer.json"))
    clock = start_report.Clock()

    def make_engine() -> Engine:
        """Runs in the scheduler's thread. Meanwhile `/health` answers 503, starting."""
        try:
            engine = start_engine(options, clock)
            report(options, clock, earlier)
        except BaseException:
            server.should_exit = True  # without an engine the server must end
            raise
        return engine

    scheduler = Scheduler(make_engine, options.max_waiting)
    app = make_app(scheduler, options.model, tokenizer, stop)
    wait = round(options.drain + GRACE)
    config = uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=wait)
    server = Server(config, scheduler, options.drain)
    with socket.create_server((options.host, options.port)) as listening:
        print(f"http://{options.host}:{listening.getsockname()[1]}", flush=True)
        signal.signal(signal.SIGTERM, server.stop)
        scheduler.start()
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after its shutdown
            server.run(sockets=[listening])
    code = 1 if scheduler.error else 0
    if not scheduler.join(0):
        sys.stdout.flush()
        os._exit(code)  # the engine's thread is in a call, and Python must not be taken away below it
    return code


if __name__ == "__main__":
    sys.exit(main())
