"""`python -m aot_cache`: the command line, where the script `aot-cache` is not on PATH."""

import sys

from aot_cache.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
