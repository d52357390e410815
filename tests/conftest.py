"""Fixtures that many tests use: a real S3 server for the session, and a store (folder or S3) per test."""

import ast
import itertools
import os
import shutil
import signal
import socketserver
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from pipelines.local.s3_server import LocalS3
from tests.named_tokens import chatml_model  # noqa: F401 - a fixture of all layers
from tests.packed_data import packed_chinese, packed_instructions, packed_text  # noqa: F401 - fixtures of all layers
from tests.texts import chinese_sentences, code_lines, llama_shaped
from zhllama import storage

# tests run side by side on few cores: one thread per process is faster than many that fight
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
# a shell that starts the suite in the background has it ignore Ctrl-C, and every program under test inherits that
signal.signal(signal.SIGINT, signal.default_int_handler)

# the servers of the tests: with 5 waiting connections, socketserver's own number, a busy machine resets some
socketserver.TCPServer.request_queue_size = 128

# The same examples each time, so that what passed before a change is pushed passes after it; `--hypothesis-profile
# search` looks for new ones. On a busy machine an example may take long: that says nothing about the code.
hypothesis.settings.register_profile("search", deadline=None)
hypothesis.settings.register_profile("same each time", deadline=None, derandomize=True)
hypothesis.settings.load_profile("same each time")

_numbers = itertools.count()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalS3]:
    """SeaweedFS on loopback, one for the session (one per xdist worker)."""
    with LocalS3(tmp_path_factory.mktemp("s3"), bucket="tests") as server:
        yield server


@pytest.fixture
def s3_store(s3_server: LocalS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """An empty s3:// prefix of its own, with the environment that reaches it."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ZHLLAMA_CACHE", str(tmp_path / "cache"))
    storage.forget_client()
    return f"s3://tests/{os.getpid()}-{next(_numbers)}"


@pytest.fixture
def full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with 1,000 bytes free, for whoever asks."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store of each kind: the test runs once with a folder and once with S3."""
    if request.param == "folder":
        return str(tmp_path / "store")
    return str(request.getfixturevalue("s3_store"))


# --- texts and a tokenizer --------------------------------------------------------------------------------------------

_MODULES = (
    "argparse bisect configparser contextlib csv datetime decimal difflib enum fractions functools getopt gettext "
    "heapq inspect mailbox optparse pathlib pickle pprint queue random sched shelve shutil smtplib socket statistics "
    "string subprocess tarfile tempfile textwrap threading tokenize traceback uuid weakref zipfile"
)


@pytest.fixture(scope="session")
def english_text() -> list[str]:
    """Some thousand English lines: the docstrings of the standard library."""
    found: dict[str, None] = {}
    for name in _MODULES.split():
        source = Path(sysconfig.get_path("stdlib"), f"{name}.py")
        for node in ast.walk(ast.parse(source.read_text("utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                lines = (ast.get_docstring(node) or "").splitlines()
                found.update((line.strip(), None) for line in lines if len(line) > 40 and line.isascii())
    return list(found)


@pytest.fixture(scope="session")
def chinese_text() -> list[str]:
    """Six hundred different Chinese sentences, made of templates and word lists; the same in every session."""
    return list(islice(chinese_sentences(), 600))


@pytest.fixture(scope="session")
def llama_tokenizer(english_text: list[str]) -> bytes:
    """A small tokenizer.model of LLaMA's shape: 800 pieces."""
    return llama_shaped((" ".join(line.split()) for line in english_text[:3000]), 800)


@pytest.fixture(scope="session")
def chinese_tokenizer(chinese_text: list[str]) -> bytes:
    """A small Chinese tokenizer.model, as train_tokenizer makes it: 800 pieces."""
    from components.train_tokenizer.sentencepiece_trainer import trained

    return trained(chinese_text, 800, 0.9995, "chinese_text")


@pytest.fixture(scope="session")
def byte_level_files(english_text: list[str], chinese_text: list[str]) -> dict[str, dict[str, bytes]]:
    """Small byte-level tokenizers, the files of a model folder, by the base that they are shaped as: 1,500 pieces."""
    from tests.byte_level_bases import SHAPES

    lines = [*english_text[:2500], *islice(code_lines(), 500), *chinese_text[:40]]
    return {name: make(lines, 1500) for name, make in SHAPES.items()}


# --- a tiny model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_state(llama_tokenizer: bytes) -> dict[str, Any]:
    """A seeded random LLaMA as a Hugging Face state dict, float16: 64 wide, 2 layers, 4 heads, 800 pieces."""
    import torch

    from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder

    chance = torch.Generator().manual_seed(64)
    rows = SentencePieceEncoder(llama_tokenizer).size
    shapes = {"model.embed_tokens.weight": (rows, 64), "lm_head.weight": (rows, 64), "model.norm.weight": (64,)}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (64, 64) for name in "qkvo"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (192, 64) for name in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj.weight"] = (64, 192)
        shapes |= {f"{prefix}.{name}_layernorm.weight": (64,) for name in ("input", "post_attention")}
    # norms about 1, the rest with LLaMA's spread at this width, so that logits are of ordinary size
    return {
        name: (torch.randn(shape, generator=chance) * 0.1 + (len(shape) == 1)).half() for name, shape in shapes.items()
    }


@pytest.fixture(scope="session")
def tiny_meta(tmp_path_factory: pytest.TempPathFactory, tiny_state: dict[str, Any], llama_tokenizer: bytes) -> Path:
    """`tiny_state` as a folder in Meta's layout: two shards, params.json, tokenizer.model, sha256sums.txt."""
    from zhllama.weights.meta_format import MetaParams, meta_files

    folder = tmp_path_factory.mktemp("tiny-meta")
    params = MetaParams(dim=64, n_layers=2, n_heads=4, norm_eps=1e-6, multiple_of=32)
    for name, content in meta_files(tiny_state, params, llama_tokenizer, shards=2).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_meta: Path) -> str:
    """The reference of the Hugging Face model that convert_weights makes of `tiny_meta`; its folder is the parent."""
    from components.convert_weights.converter import convert_weights
    from components.convert_weights.options import ConvertWeights
    from zhllama.stage.run import run_stage

    store = str(tmp_path_factory.mktemp("tiny-model"))
    return run_stage(ConvertWeights(store=store, weights=str(tiny_meta)), convert_weights).reference


@pytest.fixture(scope="session")
def tied_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: str) -> str:
    """`tiny_model` with its embedding for a head, a folder as transformers saves one."""
    from transformers import AutoModelForCausalLM

    folder, tiny = tmp_path_factory.mktemp("tied-model"), Path(tiny_model).parent
    model = AutoModelForCausalLM.from_pretrained(tiny, tie_word_embeddings=True)
    model.tie_weights()
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes((tiny / "tokenizer.model").read_bytes())
    return str(folder)


@pytest.fixture(scope="session")
def extended_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: str, chinese_tokenizer: bytes) -> str:
    """The reference of `tiny_model` extended by the pieces of `chinese_tokenizer` and [PAD]."""
    from components.extend_tokenizer.extender import extend_tokenizer
    from components.extend_tokenizer.options import ExtendTokenizer
    from zhllama.stage.run import run_stage

    folder = tmp_path_factory.mktemp("extended-model")
    (folder / "tokenizer.model").write_bytes(chinese_tokenizer)
    options = ExtendTokenizer(
        store=str(folder / "store"), model=tiny_model, chinese_tokenizer=str(folder / "tokenizer.model")
    )
    return run_stage(options, extend_tokenizer).reference


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The memory that a stream of weights uses again and again, pool by pool; its spans are small."""
    from zhllama.weights import stream

    made: list[Any] = []

    class Counted(stream.Pool):
        def __init__(self, least: int) -> None:
            super().__init__(least)
            made.append(self)

    monkeypatch.setattr(stream, "Pool", Counted)
    monkeypatch.setattr(stream, "SPAN", 64 * 64)
    return made


@pytest.fixture(scope="session")
def loaded(tiny_model: str) -> Any:
    """The tiny model, as evaluate and generate load it."""
    from tests.loaded_model import load_model

    return load_model(tiny_model)


@pytest.fixture
def without_bytes(loaded: Any) -> Any:
    """The model with its tokenizer bereft of byte fallback: Chinese is one unknown piece to it."""
    import dataclasses

    from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder
    from zhllama.tokenizer.sentencepiece_model import parse_model

    proto = parse_model(loaded.encoder.model)
    proto.trainer_spec.byte_fallback = False
    for piece in proto.pieces:
        piece.type = 1 if piece.type == 6 else piece.type
    return dataclasses.replace(loaded, encoder=SentencePieceEncoder(proto.SerializeToString()))
