"""What reads files of others, by name: a function of one file's bytes, which ends well or with an InputError.

Around that file lie good ones (a tiny model's), in memory where the reader takes an artifact.
"""

import io
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

from zhllama.artifacts.blocks import BLOCK
from zhllama.artifacts.lineage import lineage
from zhllama.artifacts.manifest import File, Input, Manifest
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder
from zhllama.tokenizer.vocabulary import load_encoder
from zhllama.weights.safetensors_io import Checkpoint

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Target:
    """`read`: the reader, given the bytes and an empty folder. `seeds`: good files to begin with. `form`: in which
    their parts are changed (mutations.py)."""

    read: Callable[[bytes, Path], object]
    seeds: Callable[[], Iterable[bytes]]
    form: str = "bytes"


def held(files: Mapping[str, bytes]) -> Artifact:
    """A plain folder that is not on the disk."""

    def read(name: str, start: int, length: int, buffer: memoryview, take: Any) -> None:
        room = min(len(buffer), length) or 1
        for at in range(0, length, room):
            piece = buffer[: min(room, length - at)]
            piece[:] = files[name][start + at : start + at + len(piece)]
            if take:
                take(at, piece)

    listed = tuple(File(name, len(content), "") for name, content in files.items())
    return Artifact(Manifest("", "", "/model", listed), False, read)


# --- a tiny model -----------------------------------------------------------------------------------------------------


@cache
def settings_files() -> dict[str, bytes]:
    """Of a LLaMA of one layer: what lies beside its weights."""
    from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder
    from zhllama.tokenizer.sentencepiece_model import BPE, BYTE, CONTROL, UNKNOWN, new_model

    pieces: list[dict[str, Any]] = [{"piece": "<unk>", "type": UNKNOWN}]
    pieces += [{"piece": text, "type": CONTROL} for text in ("<s>", "</s>")]
    pieces += [{"piece": f"<0x{byte:02X}>", "type": BYTE} for byte in range(256)]
    texts = ("▁我", "们好", "▁我们好", *"▁我们好吗的在了是人a")
    pieces += [{"piece": text, "score": float(-number)} for number, text in enumerate(texts)]
    trained = {"model_type": BPE, "byte_fallback": True, "vocab_size": len(pieces), "unk_id": 0, "pad_id": -1}
    spec = {"name": "identity", "add_dummy_prefix": True, "remove_extra_whitespaces": False}
    tokenizer = new_model(pieces=pieces, trainer_spec=trained, normalizer_spec=spec).SerializeToString()
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 12,
        "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": len(pieces), "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "rope_scaling": {"type": "linear", "factor": 2.0},
        "hidden_act": "silu", "torch_dtype": "float16", "tie_word_embeddings": False,
    }  # fmt: skip
    return {
        **SentencePieceEncoder(tokenizer).files(64),
        "config.json": json.dumps(config).encode(),
        "generation_config.json": b'{"eos_token_id": [2], "temperature": 0.5}',
        "added_tokens.json": b"{}",
        "special_tokens_map.json": b'{"bos_token": "<s>", "pad_token": {"content": "</s>"}}',
        "README.md": b"---\nlicense: llama2\nbase_model: [a/b]\n---\n# A model\n",
    }


@cache
def tensors() -> dict[str, Any]:
    import torch

    from zhllama.models import architecture
    from zhllama.weights.model_config import checked_config

    settings = checked_config(json.loads(settings_files()["config.json"]), "here")
    places = architecture(settings, "here").places(settings)
    return {place.hf: torch.ones(place.shape, dtype=torch.float16) for place in places}


@cache
def model() -> dict[str, bytes]:
    return {**settings_files(), "model.safetensors": _saved(tensors())}


def _saved(given: Mapping[str, Any]) -> bytes:
    from safetensors.torch import save

    return save(dict(given))


def _pickled(given: Any, **how: Any) -> bytes:
    import torch

    made = io.BytesIO()
    torch.save(given, made, **how)
    return made.getvalue()


def _of_model(name: str) -> Callable[[], list[bytes]]:
    return lambda: [model()[name]]


# --- weights ----------------------------------------------------------------------------------------------------------


def _read_all(checkpoint: Any) -> None:
    for name in list(checkpoint.tensors):
        checkpoint.read(name)
        checkpoint.read(name, 0, min(1, *checkpoint.tensors[name].shape[:1] or (1,)))


def weights(name: str, beside: Mapping[str, bytes] | None = None) -> Callable[[bytes, Path], object]:
    """A model's weights, or their index, are the bytes; they are indexed, held against config.json, and read."""

    def read(content: bytes, folder: Path) -> None:
        from zhllama.weights.model_config import model_config as of_model

        files = {other: one for other, one in model().items() if other != "model.safetensors"}
        checkpoint = Checkpoint(held({**files, **(beside or {}), name: content}))
        _read_all(checkpoint)
        of_model(checkpoint)

    return read


def indexed(content: bytes, folder: Path) -> None:
    weights("model.safetensors.index.json", {"model-1.safetensors": model()["model.safetensors"]})(content, folder)


def consolidated(content: bytes, folder: Path) -> None:
    from zhllama.weights.torch_zip import PthFile

    _read_all(PthFile(held({"consolidated.00.pth": content}), "consolidated.00.pth"))


def params(content: bytes, folder: Path) -> None:
    from zhllama.weights.meta_format import MetaParams, places

    found = MetaParams.from_json(content, "params.json")
    list(islice(places(found.n_layers, found.n_heads, found.kv_heads), 10))
    found.to_json()


def _state() -> list[bytes]:
    import torch

    odd = {"a": torch.ones(4, 4).t(), "b": torch.ones(8)[2:4], "c": torch.ones(2, dtype=torch.bfloat16)}
    return [_pickled(tensors()), _pickled({"state_dict": odd, "epoch": 3})]


# --- adapters ---------------------------------------------------------------------------------------------------------

_ADAPTER_CONFIG = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"],
    "lora_dropout": 0.05, "rank_pattern": {"layers.0.self_attn.k_proj": 1}, "alpha_pattern": {}, "bias": "none",
    "layers_to_transform": None, "trainable_token_indices": {"embed_tokens": [1, 2]}, "init_lora_weights": True,
}  # fmt: skip


@cache
def adapter_tensors() -> dict[str, Any]:
    import torch

    begin = "base_model.model.model"
    rows = int(json.loads(model()["config.json"])["vocab_size"])
    return {
        f"{begin}.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 8),
        f"{begin}.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(8, 2),
        f"{begin}.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 8),
        "base_model.model.lm_head.weight": torch.ones(rows, 8),
    }


def adapter(name: str) -> Callable[[bytes, Path], object]:
    def read(content: bytes, folder: Path) -> None:
        from zhllama.weights.adapter import Adapter

        files = {"adapter_config.json": json.dumps(_ADAPTER_CONFIG).encode()}
        if name == "adapter_config.json":
            files["adapter_model.safetensors"] = _saved(adapter_tensors())
        found = Adapter(held({**files, name: content}), "--adapters")
        list(found.peft_keys())
        found.config.for_peft()
        found.fitted({name: tuple(one.shape) for name, one in tensors().items()}, "the model", None)
        for key in found.stored:
            found.read(key)

    return read


# --- tokenizers and settings ------------------------------------------------------------------------------------------


def settings(name: str) -> Callable[[bytes, Path], object]:
    """A file beside the weights: all that is read of a model's folder."""

    def read(content: bytes, folder: Path) -> None:
        from zhllama.tokenizer.special_ids import special_ids
        from zhllama.weights.chat_template import default_of, template_in, without_markers
        from zhllama.weights.model_card import origin_of, terms_in
        from zhllama.weights.settings import read_settings

        artifact = held({**model(), name: content})
        encoder = load_encoder(artifact, "--model")
        encoder.vocabulary()
        encoder.decode(encoder.encode("我们好吗？ a\n"))
        checkpoint = Checkpoint(artifact)
        special_ids(encoder, read_settings(checkpoint), "--model /model")
        if (template := template_in(artifact, "--model")) is not None:
            default_of(template)
            without_markers(template)
        origin_of(artifact)
        terms_in(artifact)

    return read


def fast_alone(content: bytes, folder: Path) -> None:
    files = {name: one for name, one in model().items() if name != "tokenizer.model"}
    load_encoder(held({**files, "tokenizer.json": content}), "--tokenizer").encode("我们好吗？ a\n")


def template(content: bytes, folder: Path) -> None:
    from zhllama.tokenizer.chat import Chat
    from zhllama.weights.chat_template import default_of, template_in

    text = default_of(template_in(held({**model(), "chat_template.jinja": content}), "--model"))
    Chat(SentencePieceEncoder(model()["tokenizer.model"]), text).ids([{"role": "user", "content": "你好</s>"}])


def gguf_source(content: bytes, folder: Path) -> None:
    """As fetch_weights and convert_weights read one: header, settings, tokenizer, every tensor's rows."""
    from zhllama.tokenizer.gguf_tokenizer import ends_of, tokenizer_files_of
    from zhllama.weights.gguf_config import gguf_places
    from zhllama.weights.gguf_file import GgufFile

    found = GgufFile(held({"model.gguf": content}), "--weights")
    load_encoder(held(tokenizer_files_of(found.fields, found.where)), "--weights").encode("我们好吗？ a\n")
    ends_of(found.fields)
    for place in gguf_places(found)[1].values():
        for _ in found.pieces(found.tensors[place.gguf], place.shape[0] // place.heads if place.heads else 1):
            pass


def _gguf_source_seeds() -> list[bytes]:
    """A model of one layer in several types, with either kind of tokenizer."""
    from tests.gguf_models import sentencepiece_fields
    from zhllama.tokenizer.gguf_tokenizer import PRE, byte_level_fields, byte_level_json

    config = {
        "max_position_embeddings": 64, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64,
        "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    pieces = sentencepiece_fields(model()["tokenizer.model"])
    letters = {letter: index for index, letter in enumerate(dict.fromkeys((*map(chr, range(33, 127)), "ĠĊ")))}
    fast = byte_level_json(
        letters | {"ab": len(letters)}, [["a", "b"]], {len(letters) + 1: ("<s>", True)}, PRE["gpt-2"]
    )
    bytewise = byte_level_fields(fast, "here") | {"tokenizer.ggml.eos_token_id": len(letters) + 1}
    return [_small_gguf(config, pieces, "Q4_1"), _small_gguf(config, bytewise, "F16")]


def _small_gguf(config: dict[str, Any], tokenizer: dict[str, Any], kind: str) -> bytes:
    import tempfile

    import torch

    from tests.gguf_models import write_gguf
    from zhllama.models import ARCHITECTURES

    rows = len(tokenizer["tokenizer.ggml.tokens"])
    places = ARCHITECTURES["llama"].places(config | {"vocab_size": rows, "head_dim": 16})
    state = {place.hf: torch.ones(place.shape) for place in places if place.kind != "head"}
    with tempfile.TemporaryDirectory() as folder:
        return write_gguf(Path(folder, "model.gguf"), state, config, tokenizer, kind).read_bytes()


def tiktoken(content: bytes, folder: Path) -> None:
    from zhllama.tokenizer.tiktoken_file import tokenizer_files_of

    files = tokenizer_files_of(content, True, "here")
    load_encoder(held(files), "--weights").encode("我们好吗？ a\n")


def _tiktoken_seeds() -> list[bytes]:
    import base64

    tokens = [*(bytes([value]) for value in range(256)), b"ab", b"abc", "我".encode()]
    return [b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))]


def gguf(content: bytes, folder: Path) -> None:
    from components.serve.check import check_gguf

    path = folder / "model.gguf"
    path.write_bytes(content)
    check_gguf(path, None, "model.gguf")


def _gguf_seed() -> list[bytes]:
    """As export_model writes them: no tensors."""
    import tempfile

    from gguf import GGUFWriter

    from zhllama.tokenizer.prompt import RECIPE
    from zhllama.tokenizer.sentencepiece_model import parse_model

    proto = parse_model(model()["tokenizer.model"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.gguf")
        writer = GGUFWriter(path, "llama")
        for name, value in (("context_length", 64), ("embedding_length", 8), ("block_count", 1), ("head_count", 2)):
            getattr(writer, f"add_{name}")(value)
        writer.add_feed_forward_length(12)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_dimension_count(4)
        writer.add_tokenizer_model("llama")
        writer.add_token_list([piece.piece for piece in proto.pieces])
        writer.add_token_scores([piece.score for piece in proto.pieces])
        writer.add_token_types([piece.type for piece in proto.pieces])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_chat_template(RECIPE.plain)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return [path.read_bytes()]


# --- artifacts --------------------------------------------------------------------------------------------------------


def _published() -> Manifest:
    import hashlib
    from dataclasses import replace

    vocabulary = SentencePieceEncoder(model()["tokenizer.model"]).vocabulary(padding_multiple=8)
    content = model()["config.json"]
    files = (File("config.json", len(content), hashlib.sha256(content).hexdigest()),)
    made = Manifest(
        "hf-model", "convert_weights", "/somewhere", files, None, vocabulary, {"dtype": "float16", "model": "s3://a/b"},
        {"model": Input("s3://a/b", "0" * 64)}, {"splits": {"train": {"shards": [3]}}, "summary": {"x": 1}},
        {"seconds": 1.5}, "2026-01-01T00:00:00Z", "host",
    )  # fmt: skip
    return replace(made, digest=made.computed_digest())


def manifest(content: bytes, folder: Path) -> None:
    """As it is, and as if its digest were right: who writes a manifest can compute it."""
    (folder / "config.json").write_bytes(model()["config.json"])
    (folder / "provenance.json").write_bytes(_published().provenance_json())
    (folder / "manifest.json").write_bytes(content)
    original = Manifest.computed_digest

    def right(self: Manifest) -> str:
        original(self)
        return self.digest

    with mock.patch.object(Manifest, "computed_digest", right):
        _use(folder)


def provenance(content: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(model()["config.json"])
    (folder / "manifest.json").write_bytes(_published().to_json())
    (folder / "provenance.json").write_bytes(content)
    _use(folder)


def _use(folder: Path) -> None:
    from rich.console import Console

    from pipelines.cli.artifacts import shown

    artifact = open_artifact(str(folder), "--model")
    found = artifact.manifest
    Manifest.from_json(found.to_json(found.root), "again", None)
    found.provenance_json()
    with mock.patch("sys.stdout", io.StringIO()):
        Console(file=io.StringIO()).print(shown(found, lineage(found)))
    artifact.find_corruption()
    artifact.verify()


def blocks(content: bytes, folder: Path) -> None:
    import hashlib

    large = File("large", BLOCK + 1, "0" * 64)
    listed = File("blocks.json", len(content), hashlib.sha256(content).hexdigest())

    def read(name: str, start: int, length: int, buffer: memoryview, take: Any) -> None:
        buffer[:length] = content[start : start + length] if name == "blocks.json" else bytes(length)
        if take:
            take(0, buffer[:length])

    artifact = Artifact(Manifest("x", "x", "/model", (large, listed), "blocks.json"), True, read)
    artifact.read_range("large", BLOCK, 1)


def _block_seed() -> list[bytes]:
    from zhllama.artifacts.blocks import block_digests

    value = {"digest": "blake3", "bytes": BLOCK, "files": {"large": block_digests(bytes(BLOCK + 1))}}
    return [json.dumps(value).encode()]


# --- data -------------------------------------------------------------------------------------------------------------


def instructions(name: str) -> Callable[[bytes, Path], object]:
    def read(content: bytes, folder: Path) -> None:
        from zhllama.data.corpus import Skipped
        from zhllama.data.instructions import read_instructions

        for skipped in (Skipped(), None):
            for _ in read_instructions(held({name: content}), skipped=skipped):
                pass

    return read


def corpus(name: str) -> Callable[[bytes, Path], object]:
    def read(content: bytes, folder: Path) -> None:
        from zhllama.data.corpus import Skipped, read_documents

        for skipped in (Skipped(), None):
            for _ in read_documents(held({name: content}), skipped=skipped):
                pass

    return read


_ITEMS = [
    {"instruction": "说", "input": "", "output": "好"},
    {"instruction": "x", "output": "\ud83e\udd17", "system": "s", "history": [["a", "b"]]},
    {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
    {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]},
]


def _lines(values: Iterable[Any]) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def _table() -> list[bytes]:
    import pyarrow
    from pyarrow import parquet

    made = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["我们好", "a"]}), made)
    return [made.getvalue()]


def _packed_gzip() -> list[bytes]:
    import gzip

    return [gzip.compress("我们好\n吗\n".encode(), mtime=0)]


# --- what our own runs leave ------------------------------------------------------------------------------------------


@cache
def _packed() -> tuple[Manifest, dict[str, bytes]]:
    """A packed dataset of two blocks, and its files."""
    import tempfile

    import numpy as np

    from zhllama.artifacts.writer import ArtifactWriter
    from zhllama.data.packed import KIND, TRAIN, Blocks, PackedWriter, Segments, packed_facts

    encoder = SentencePieceEncoder(model()["tokenizer.model"])
    ids, lengths = np.arange(9), np.array([3, 2, 4])
    with tempfile.TemporaryDirectory() as folder:
        out = ArtifactWriter(folder, "prepare_dataset", "key")
        with PackedWriter(out, TRAIN, 8, encoder.size, 0) as train:
            # of which the last is a conversation of two turns
            marks = np.array([0, 1, 1, 1, 1, 0, 1, 0, 1], np.uint8)
            train.write_blocks(Blocks(Segments(ids, lengths, np.array([1, 0, 1]), marks), np.array([2, 1])))
        out.vocabulary = encoder.vocabulary()
        out.facts = packed_facts(8, encoder.size, 0, [train])
        made = open_artifact(out.publish(KIND).reference)
        return made.manifest, {name: made.read(name) for name in made.names}


def packed(name: str = "") -> Callable[[bytes, Path], object]:
    """One of a packed dataset's files, or its facts, are the bytes."""

    def read(content: bytes, folder: Path) -> None:
        from dataclasses import replace

        from zhllama.artifacts.json_file import value_of
        from zhllama.data.packed import PackedDataset

        published, files = _packed()
        artifact = held({**files, name: content} if name else files)
        facts = published.facts
        if not name:
            try:
                facts = value_of(content)
            except ValueError:
                return
            if not isinstance(facts, dict):
                # a manifest's reader has refused it
                return
        artifact.manifest = replace(artifact.manifest, facts=facts, vocabulary=published.vocabulary)
        dataset = PackedDataset(artifact, by_range=True)
        for index in range(min(len(dataset), 4)):
            dataset[index]

    return read


def _of_packed(name: str) -> Callable[[], list[bytes]]:
    return lambda: [_packed()[1][name]]


@cache
def _state_files() -> dict[str, bytes]:
    """Of a checkpoint: a tree, and its tensors."""
    import torch

    from zhllama.training.checkpoints import SHARED, TRAINER, WEIGHTS, state_of
    from zhllama.training.training_state import flatten

    tensors: dict[str, Any] = {}
    tree = {
        "loss": {"sum": 1.5, "total": 2.0, "logged": 3},
        "random": {"torch": torch.ones(4), "python": (3, [1, None])},
    }
    places = json.dumps(flatten(tree, tensors)).encode()
    own, saved = state_of(0), _saved(tensors)
    return {
        TRAINER: b'{"global_step": 3, "log_history": [{"loss": 1.5, "step": 1}]}',
        WEIGHTS: _saved({"a": torch.ones(2, 2)}),
        **{f"{name}.json": places for name in (own, SHARED)},
        **{f"{name}.safetensors": saved for name in (own, SHARED)},
    }


def checkpoint(content: bytes, folder: Path) -> None:
    """A rank's state: what cannot be is refused, and the training goes on from another (checkpointing.py)."""
    from zhllama.training.checkpoints import state_of
    from zhllama.training.training_state import Saved

    artifact = held({**_state_files(), f"{state_of(0)}.json": content})
    artifact.manifest.facts.update(step=3, world=1)  # type: ignore[attr-defined]
    try:
        Saved(artifact, 0, 1)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(str(error)[:200]) from error


def _checkpoint() -> list[bytes]:
    from zhllama.training.checkpoints import state_of

    return [_state_files()[f"{state_of(0)}.json"]]


def _journal() -> list[dict[str, Any]]:
    sent = {"request": 0, "attempt": 1, "prompt_tokens": 10, "answer_tokens": 20}
    told: list[dict[str, Any]] = [
        {"event": "dialect", "dialect": {"a": 1}},
        {"event": "sent", **sent},
        {"event": "answered", **sent, "model": "m", "content": "[]"},
        {"event": "sent", **sent, "attempt": 2},
        {"event": "failed", **sent, "reason": "a timeout", "may_be_billed": True},
        {"event": "batch planned", "batch": "b", "requests": [[1, 1, 10, 20]]},
        {"event": "batch created", "batch": "b", "id": "x"},
        {"event": "batch ended", "batch": "b"},
        {"event": "given up", **sent},
    ]
    return [{"time": "2026-01-01T00:00:00Z", **one} for one in told]


def journal(content: bytes, folder: Path) -> None:
    from components.generate_instructions.journal import NAME, Journal
    from components.generate_instructions.ledger import replayed

    (folder / NAME).write_bytes(content)
    with Journal(str(folder)) as there:
        found = replayed(there.records)
    "".join(found.settled.values())
    found.charged.total  # noqa: B018 - it is reckoned


def answers(content: bytes, folder: Path) -> None:
    """Of generate: in a store, and in a file of one's own."""
    from components.generate.journal import file_journal, store_journal

    (folder / ".answers").mkdir()
    (folder / ".answers" / "00000000.json").write_bytes(content)
    (folder / "mine.jsonl").write_bytes(content)
    (folder / ".mine.jsonl.key").write_bytes(b"key")
    for opened in (store_journal(str(folder), ["a", "b"]), file_journal(folder / "mine.jsonl", "key", ["a", "b"])):
        with opened:
            pass


def _answers() -> list[bytes]:
    given = [{"Input": "a", "Output": "x"}, {"Input": "b", "Output": "y"}]
    return [json.dumps(given).encode(), _lines(given)]


def parts(content: bytes, folder: Path) -> None:
    """Which parts of a file were fetched."""
    from components.fetch_weights.resumable import open_parts

    (folder / ".file.parts").write_bytes(b"12345")
    (folder / ".file.parts.txt").write_bytes(content)
    made = open_parts(str(folder / "file"), 5)
    made.put(0, b"12345")
    made.commit()


# --- pipelines, manifests ---------------------------------------------------------------------------------------------

JOB = dict.fromkeys(("pipeline_job_uuid", "pipeline_job_name", "pipeline_job_resource_name"), "x")


def ir(content: bytes, folder: Path) -> None:
    """A pipeline that `zhllama run --package` is given, up to where its first step would start."""
    from pipelines.kubeflow.answers import beyond_latin1
    from pipelines.local.ir import read_package
    from pipelines.local.plan import Plan, Snapshot, checked_arguments

    path = folder / "pipeline.yaml"
    path.write_bytes(content)
    package = read_package(path)
    beyond_latin1(path)
    arguments = {"store": "s3://x"} if "store" in package.root.parameters else {}
    plan = Plan(package, checked_arguments(package, arguments), JOB)
    plan.rehearse()
    Snapshot(plan, {})
    for node in plan.steps[:5]:
        plan.until([node])
        plan.after(node.path)


def kubernetes(content: bytes, folder: Path) -> None:
    from pipelines.manifests.check.check import check

    path = folder / "manifest.yaml"
    path.write_bytes(content)
    for finding in check([path]):
        str(finding)


def _manifests() -> list[bytes]:
    paths = sorted((REPOSITORY / "k8s").rglob("*.yaml"), key=lambda path: path.stat().st_size)
    return [path.read_bytes() for path in paths[:: max(1, len(paths) // 12)] if path.stat().st_size < 20_000]


_DEFINITION = b"""\
kind: CustomResourceDefinition
spec:
  group: example.com
  names: {kind: Thing}
  versions:
    - name: v1
      served: true
      schema:
        openAPIV3Schema:
          type: object
          properties:
            spec:
              type: object
              required: [a, b]
              properties:
                a: {type: array, items: {type: string, pattern: "^x", default: x}, x-kubernetes-list-type: set}
                b: {type: integer, format: int32, minimum: 1, nullable: true}
                c: {anyOf: [{type: string}, {type: integer}], x-kubernetes-int-or-string: true, enum: [1, x]}
                d: {type: object, additionalProperties: {type: number}, maxProperties: 2}
              x-kubernetes-validations: [{rule: "self.b > 0", message: no}]
"""


def definition(content: bytes, folder: Path) -> None:
    """Of a custom resource, and an object held to it."""
    from pipelines.manifests.check.check import check
    from pipelines.manifests.check.schema import definitions

    (folder / "crds").mkdir()
    (folder / "crds" / "crd.yaml").write_bytes(content)
    thing = folder / "thing.yaml"
    spec = "{a: [x, x, y], b: null, c: 1, d: {e: 1, f: x}, g: {}}"
    thing.write_text(f"apiVersion: example.com/v1\nkind: Thing\nmetadata: {{name: a}}\nspec: {spec}\n")
    try:
        for finding in check([thing], folder / "crds"):
            str(finding)
    finally:
        definitions.cache_clear()


def size(content: bytes, folder: Path) -> None:
    from pipelines.sizes import read

    path = folder / "7b.yaml"
    path.write_bytes(content)
    read(path)


def catalogue(content: bytes, folder: Path) -> None:
    from components.generate_instructions.catalogue import load_catalogue

    load_catalogue(content)


def _repository(*names: str) -> Callable[[], list[bytes]]:
    return lambda: [(REPOSITORY / name).read_bytes() for name in names]


TARGETS: dict[str, Target] = {
    "ir": Target(ir, list, "yaml"),
    "manifest": Target(manifest, lambda: [_published().to_json()], "json"),
    "provenance": Target(provenance, lambda: [_published().provenance_json()], "json"),
    "blocks": Target(blocks, _block_seed, "json"),
    "safetensors": Target(weights("model.safetensors"), _of_model("model.safetensors"), "safetensors"),
    "torch_zip": Target(weights("pytorch_model.bin"), _state, "zip"),
    "consolidated": Target(consolidated, _state, "zip"),
    "params": Target(
        params,
        lambda: [b'{"dim": 8, "n_layers": 1, "n_heads": 2, "norm_eps": 1e-5, "vocab_size": -1, "multiple_of": 256}'],
        "json",
    ),
    "index": Target(
        indexed,
        lambda: [json.dumps({"weight_map": dict.fromkeys(tensors(), "model-1.safetensors")}).encode()],
        "json",
    ),
    "adapter_config": Target(
        adapter("adapter_config.json"), lambda: [json.dumps(_ADAPTER_CONFIG).encode()], "json"
    ),
    "adapter": Target(
        adapter("adapter_model.safetensors"), lambda: [_saved(adapter_tensors())], "safetensors"
    ),
    "adapter_pickle": Target(
        adapter("adapter_model.bin"),
        lambda: [_pickled(adapter_tensors()), _pickled(adapter_tensors(), _use_new_zipfile_serialization=False)],
        "zip",
    ),
    "config": Target(settings("config.json"), _of_model("config.json"), "json"),
    "generation_config": Target(settings("generation_config.json"), _of_model("generation_config.json"), "json"),
    "tokenizer_config": Target(settings("tokenizer_config.json"), _of_model("tokenizer_config.json"), "json"),
    "tokenizer_json": Target(settings("tokenizer.json"), _of_model("tokenizer.json"), "json"),
    "tokenizer_json_alone": Target(fast_alone, _of_model("tokenizer.json"), "json"),
    "added_tokens": Target(settings("added_tokens.json"), lambda: [b'{"<0x41>": 68, "<pad>": 273}'], "json"),
    "special_tokens": Target(settings("special_tokens_map.json"), _of_model("special_tokens_map.json"), "json"),
    "tokenizer_model": Target(settings("tokenizer.model"), _of_model("tokenizer.model")),
    "model_card": Target(settings("README.md"), _of_model("README.md")),
    "template": Target(template, lambda: [json.loads(model()["tokenizer_config.json"])["chat_template"].encode()]),
    "gguf": Target(gguf, _gguf_seed),
    "gguf_source": Target(gguf_source, _gguf_source_seeds),
    "tiktoken": Target(tiktoken, _tiktoken_seeds),
    "instructions": Target(
        instructions("items.json"),
        lambda: [json.dumps(_ITEMS).encode(), json.dumps({"train": _ITEMS}).encode(), _lines(_ITEMS)],
        "json",
    ),
    "instruction_lines": Target(instructions("items.jsonl"), lambda: [_lines(_ITEMS)]),
    "text_lines": Target(corpus("text.jsonl"), lambda: [_lines([{"text": "我们"}, {"text": "好"}])]),
    "gzip": Target(corpus("text.txt.gz"), _packed_gzip),
    "parquet": Target(corpus("text.parquet"), _table),
    "kubernetes": Target(kubernetes, _manifests, "yaml"),
    "definition": Target(definition, lambda: [_DEFINITION], "yaml"),
    "packed_facts": Target(packed(), lambda: [json.dumps(_packed()[0].facts).encode()], "json"),
    "packed_ids": Target(packed("train-00000.bin"), _of_packed("train-00000.bin")),
    "packed_offsets": Target(packed("train-00000.offsets.bin"), _of_packed("train-00000.offsets.bin")),
    "packed_segments": Target(packed("train-00000.segments.bin"), _of_packed("train-00000.segments.bin")),
    "checkpoint": Target(checkpoint, _checkpoint, "json"),
    "journal": Target(journal, lambda: [_lines(_journal())], "lines"),
    "answers": Target(answers, _answers, "json"),
    "parts": Target(parts, lambda: [b"0\n", b"\n0\n12"]),
    "size": Target(size, _repository("pipelines/sizes/7b.yaml"), "yaml"),
    "catalogue": Target(catalogue, _repository("components/generate_instructions/catalogue.yaml"), "yaml"),
}  # fmt: skip
