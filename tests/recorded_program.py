"""A program for `aot-cache record`: it compiles kernels of Triton for a GPU that is not here, in processes that end in some way.

python recorded_program.py WHERE END: WHERE is `itself`, `fork`, `spawn`, `os.fork` or `forkserver`; END is `return`, `raise`,
`os._exit`, `killed` or `terminated`. The first process launches BLOCK=16, the other one BLOCK=32. With the name of a file as
WHERE, they are the ranks of a job that find each other there, and each has chosen another config.
"""

import multiprocessing
import os
import signal
import sys
import time

import sample_for_recording as sample
import torch.distributed as dist


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


def be_rank(rank: int, store: str, end: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    (key,) = sample.tuned.cache
    sample.tuned.cache[key] = sample.tuned.configs[rank]
    work((16, 32)[rank], end)


def main(where: str, end: str) -> None:
    if os.path.isabs(where):
        ranks = [
            multiprocessing.get_context("fork").Process(target=be_rank, args=(rank, where, end)) for rank in (0, 1)
        ]
        for one in ranks:
            one.start()
        for one in ranks:
            one.join()
        return
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
