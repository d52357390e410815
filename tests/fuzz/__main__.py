"""`make fuzz`: each fuzzer's tries. `ONLY="gateway"` chooses, `TRIES=10000` says how many."""

import argparse
import importlib
import pkgutil
import sys
import tempfile
import time
from pathlib import Path

import tests.fuzz


def main() -> None:
    known = sorted(module.name for module in pkgutil.iter_modules(tests.fuzz.__path__) if module.name != "__main__")
    options = argparse.ArgumentParser(prog="python -m tests.fuzz")
    options.add_argument("--tries", type=int, default=10_000)
    options.add_argument("only", nargs="*", metavar="NAME", help=", ".join(known))
    given = options.parse_args()
    if unknown := sorted(set(given.only) - set(known)):
        sys.exit(f"{', '.join(unknown)}: no such fuzzer; there are {', '.join(known)}")
    for name in given.only or known:
        begin = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f"fuzz-{name}-") as scratch:
            counted = importlib.import_module(f"tests.fuzz.{name}").run(given.tries, Path(scratch))
        print(f"{name}, {time.monotonic() - begin:.0f} s: {counted}", flush=True)


if __name__ == "__main__":
    main()
