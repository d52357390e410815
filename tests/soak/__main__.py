"""`make soak`: many seeded runs of each soak test. `ONLY="storage"` chooses, `SEEDS=0:500` says which."""

import argparse
import importlib
import pkgutil
import sys
import tempfile
import time
from pathlib import Path

import tests.soak


def main() -> None:
    known = sorted(module.name for module in pkgutil.iter_modules(tests.soak.__path__) if module.name != "__main__")
    options = argparse.ArgumentParser(prog="python -m tests.soak")
    options.add_argument("--seeds", default="0:500", metavar="FROM:TO")
    options.add_argument("only", nargs="*", metavar="NAME", help=", ".join(known))
    given = options.parse_args()
    unknown = sorted(set(given.only) - set(known))
    if unknown:
        sys.exit(f"{', '.join(unknown)}: no such soak test; there are {', '.join(known)}")
    first, _, last = given.seeds.partition(":")
    for name in given.only or known:
        begin = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f"soak-{name}-") as scratch:
            counted = importlib.import_module(f"tests.soak.{name}").run(range(int(first), int(last)), Path(scratch))
        print(f"{name}, seeds {given.seeds}, {time.monotonic() - begin:.0f} s: {counted}", flush=True)


if __name__ == "__main__":
    main()
