import argparse
from typing import Any


class PortArgs:
    @staticmethod
    def init_new(server_args: Any) -> "PortArgs":
        return PortArgs()


def prepare_server_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sglang serve")
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--skip-tokenizer-init", action="store_true")
    parser.add_argument("--max-running-requests", type=int, default=4)
    for split in ("tp", "pp", "dp"):
        parser.add_argument(f"--{split}", f"--{split}-size", dest=f"{split}_size", type=int, default=1)
    parsed = parser.parse_args(argv)
    if parsed.max_running_requests < 1:
        raise ValueError("max_running_requests must be positive")
    return parsed
