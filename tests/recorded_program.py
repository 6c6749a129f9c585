"""A program for `aot-cache record`: it compiles kernels of Triton for a GPU that is not here, in processes that end in some way.

python recorded_program.py WHERE END: WHERE is `itself`, `fork`, `spawn`, `os.fork` or `forkserver`; END is `return`, `raise`,
`os._exit`, `killed` or `terminated`. The first process launches BLOCK=16, the other one BLOCK=32.
"""

import multiprocessing
import os
import signal
import sys
import time

import sample_for_recording as sample


def work(block: int, end: str) -> None:
    sample.scale.warmup(sample.POINTER, BLOCK=block, grid=(1,))
    sample.tuned.run(sample.TENSOR, grid=(1,), warmup=True)
    if end == "raise":
        raise SystemExit(3)
    if end == "os._exit":
        os._exit(0)
    if end in ("killed", "terminated"):
        time.sleep(1.0)  # in which a thread writes
        os.kill(os.getpid(), signal.SIGKILL if end == "killed" else signal.SIGTERM)
        time.sleep(60)


def main(where: str, end: str) -> None:
    if where == "itself":
        work(16, end)
        return
    work(16, "return")
    if where == "os.fork":
        child = os.fork()
        if not child:
            work(32, end)
            os._exit(0)
        os.waitpid(child, 0)
        return
    process = multiprocessing.get_context(where).Process(target=work, args=(32, end))
    process.start()
    process.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
