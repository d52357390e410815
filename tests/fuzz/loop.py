"""One target's loop, in a process of its own: `python -m tests.fuzz.loop TARGET FOLDER SECONDS`.

atheris (libFuzzer) looks for files that reach new lines of ours; what fails is written to FOLDER, one file for each
place and kind, and the loop goes on. What ends the process or takes too long libFuzzer writes there itself.
"""

import random
import sys
from hashlib import sha256
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["zhllama", "pipelines", "components", "gguf"]):
    from tests.fuzz.judged import SECONDS, files, judged, quiet
    from tests.fuzz.mutations import changed
    from tests.fuzz.readers import TARGETS

    name, folder, seconds = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    target = TARGETS[name]
    quiet()
    # what a reader imports when it is called
    for content in files(name):
        judged(target, content)


def main() -> None:
    begun = folder / "begun"
    begun.mkdir(parents=True, exist_ok=True)
    for content in files(name):
        (begun / sha256(content).hexdigest()[:16]).write_bytes(content)
    found: set[str] = set()

    def one(content: bytes) -> None:
        if not (wrong := judged(target, content)):
            return
        kind = wrong.partition(": ")[0]
        if kind not in found:
            found.add(kind)
            (folder / f"found-{sha256(kind.encode()).hexdigest()[:8]}").write_bytes(content)
            print(f"FOUND {name}: {wrong}", flush=True)

    def mutate(content: bytes, most: int, seed: int) -> bytes:
        def of_bytes(some: bytes) -> bytes:
            return bytes(atheris.Mutate(some, len(some) + 64))

        return changed(content, target.form, random.Random(seed), of_bytes)[:most]

    longest = max(len(path.read_bytes()) for path in begun.iterdir())
    options = [
        f"-max_total_time={seconds}", f"-timeout={int(SECONDS * 4)}", "-rss_limit_mb=4096",
        f"-max_len={max(4096, longest * 2)}", f"-artifact_prefix={folder}/ended-", "-print_final_stats=1",
        "-report_slow_units=5",
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, str(begun)], one, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
