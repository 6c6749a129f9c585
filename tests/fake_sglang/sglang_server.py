"""An API server, and a scheduler in a process of its own. Prints one JSON line."""

import json
import logging
import multiprocessing
import os
import sys
import tempfile
from typing import Any


def scheduler(channel: Any) -> None:
    """As SGLang's child: it imports the scheduler first, and then its plug-ins."""
    logging.basicConfig(level=logging.INFO, format="LOG %(name)s %(levelname)s %(message)s")
    from sglang.srt.managers.scheduler import run_scheduler_process

    run_scheduler_process(channel)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="LOG %(name)s %(levelname)s %(message)s")
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp()
    import sglang.srt.utils  # noqa: F401  # as SGLang's command line has, before its plug-ins
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.entrypoints.http_server import launch

    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    child = context.Process(target=scheduler, args=(theirs,))
    child.start()
    theirs.close()  # so that a child that dies ends the wait
    assert mine.recv() == {"ready": True}
    found = mine.recv()
    page = launch()()
    mine.send("end")
    child.join()
    ours = sorted(name for name in sys.modules if name.startswith("aot_cache"))
    print(json.dumps({**found, "metrics": page, "ours": ours, "exit": child.exitcode, "torch": "torch" in sys.modules}))


if __name__ == "__main__":
    main()
