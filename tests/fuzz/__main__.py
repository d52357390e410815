"""`make fuzz`: `ONLY="gateway manifest"` chooses; TRIES of the gateway's requests, MINUTES of each reader."""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz import gateway
from tests.fuzz.readers import TARGETS

GATEWAY = "gateway"


def fuzzed(name: str, minutes: float, folder: Path) -> tuple[str, list[str]]:
    """How many inputs a reader was given, and what it fell over. A process that ended early is followed by another."""
    tried, found = 0, []
    end = time.monotonic() + minutes * 60
    while (left := int(end - time.monotonic())) > 0:
        command = [sys.executable, "-m", "tests.fuzz.loop", name, str(folder), str(left)]
        # libFuzzer looks at the clock between inputs, and ends what takes too long itself
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=left + 300, check=False
        )
        said = done.stdout.decode(errors="replace")
        tried += sum(map(int, re.findall(r"number_of_executed_units: (\d+)", said)))
        found += re.findall(r"^FOUND (.*)", said, re.MULTILINE)
        if done.returncode:
            found.append(f"{name}: its process ended ({done.returncode}): …{said[-2000:]}")
            if not list(folder.glob("ended-*")):
                break
    return f"{tried:,} inputs", found


def main() -> None:
    known = [*TARGETS, GATEWAY]
    options = argparse.ArgumentParser(prog="python -m tests.fuzz")
    options.add_argument("--tries", type=int, default=10_000)
    options.add_argument("--minutes", type=float, default=3)
    options.add_argument("only", nargs="*", metavar="NAME", help=", ".join(known))
    given = options.parse_args()
    if unknown := sorted(set(given.only) - set(known)):
        sys.exit(f"{', '.join(unknown)}: no such fuzzer; there are {', '.join(known)}")
    failed = False
    for name in given.only or known:
        begin = time.monotonic()
        folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
        if name == GATEWAY:
            # ends with what it found
            counted, found = str(gateway.run(given.tries, folder)), []
        else:
            counted, found = fuzzed(name, given.minutes, folder)
        print(
            f"{name}, {time.monotonic() - begin:.0f} s: {counted}, {len(found)} findings",
            *found,
            sep="\n  ",
            flush=True,
        )
        if found:
            failed = True
            print(f"  the files: {folder}/found-*, {folder}/ended-*", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
