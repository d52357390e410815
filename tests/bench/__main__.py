"""`make bench` (all), or `make bench ONLY="merge storage"`: benchmarks one after another, and their tables."""

import importlib
import pkgutil
import sys
import tempfile
from pathlib import Path

import tests.bench

NOT_ONE = {"__main__", "measure", "small_llama"}


def main(chosen: list[str]) -> None:
    known = sorted(module.name for module in pkgutil.iter_modules(tests.bench.__path__) if module.name not in NOT_ONE)
    unknown = sorted(set(chosen) - set(known))
    if unknown:
        sys.exit(f"{', '.join(unknown)}: no such benchmark; there are {', '.join(known)}")
    for name in chosen or known:
        with tempfile.TemporaryDirectory(prefix=f"bench-{name}-") as scratch:
            for table in importlib.import_module(f"tests.bench.{name}").run(Path(scratch)):
                print(f"{table}\n", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
