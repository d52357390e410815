"""Each architecture and kind of tokenizer through the whole compiled pipeline, two processes a training: what one stage
hands to the next computes what transformers' (peft's) own classes compute, and is encoded alike everywhere."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.adapt_llama import compile_pipeline
from pipelines.configuration import configure
from pipelines.local.runner import RunResult, run_pipeline
from tests.pipelines.test_end_to_end import NANO, questions
from tests.small_models import model_of
from tests.texts import mixed_lines
from zhllama.artifacts.open import open_artifact
from zhllama.tokenizer.vocabulary import Encoder, load_encoder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass(frozen=True)
class Course:
    """A base, and what becomes of its vocabulary."""

    kind: str
    """Of tests/small_models.py."""
    tokenizer: str
    """Of tests/byte_level_bases.py; "": SentencePiece's."""
    vocabulary: str
    """The setting `tokenizer`."""
    spare: int = 0
    """Rows of the tables beyond the tokenizer's."""


COURSES = {
    "llama 3, merges continued": Course("llama3", "llama 3", "continue"),
    "mistral, pieces appended": Course("mistral-v0.3", "", "train"),
    "qwen2, vocabulary kept": Course("qwen2", "qwen", "keep", spare=40),
    "qwen3, spare rows filled": Course("qwen3", "qwen", "continue", spare=40),
}
IN_CI = "qwen3, spare rows filled"


@pytest.fixture(
    scope="module",
    params=[name if name == IN_CI else pytest.param(name, marks=pytest.mark.slowest) for name in COURSES],
)
def course(request: pytest.FixtureRequest) -> Course:
    return COURSES[request.param]


@pytest.fixture(scope="module")
def base(
    course: Course,
    tmp_path_factory: pytest.TempPathFactory,
    llama_tokenizer: bytes,
    byte_level_files: Mapping[str, Mapping[str, bytes]],
) -> Path:
    """As save_pretrained leaves it, in float32, with its tokenizer files."""
    folder = tmp_path_factory.mktemp("base")
    folder.joinpath("tokenizer.model").write_bytes(llama_tokenizer)
    if course.tokenizer:
        folder.joinpath("tokenizer.model").unlink()
        for name, content in byte_level_files[course.tokenizer].items():
            (folder / name).write_bytes(content)
    encoder = load_encoder(open_artifact(str(folder)), "--base")
    if not course.tokenizer:
        for name, content in encoder.files(256).items():
            (folder / name).write_bytes(content)
    ids = {"bos_token_id": encoder.bos, "eos_token_id": encoder.eos, "pad_token_id": encoder.pad}
    model_of(course.kind, vocab_size=encoder.size + course.spare, **ids).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapted(
    course: Course,
    base: Path,
    tmp_path_factory: pytest.TempPathFactory,
    chinese_text: list[str],
    english_text: list[str],
) -> RunResult:
    work = tmp_path_factory.mktemp("work")
    for folder, name, content in (
        ("text", "reviews.txt", "\n".join(chinese_text[:1500])),
        ("english", "english.txt", "\n".join(english_text[:100])),
        ("instructions", "items.json", json.dumps(questions(chinese_text)[:120], ensure_ascii=False)),
        ("prompts", "prompts.txt", "你好吗？"),
    ):
        (work / folder).mkdir()
        (work / folder / name).write_text(content, encoding="utf-8")
    settings = {
        **NANO,
        "store": str(work / "store"), "weights": str(base), "text": str(work / "text"),
        "english_text": str(work / "english"), "instructions": str(work / "instructions"),
        "prompts": str(work / "prompts"), "tokenizer": course.vocabulary, "block_size": "128",
        "embeddings_steps": "2", "lora_steps": "3", "sft_steps": "3",
    }  # fmt: skip
    if course.vocabulary == "keep":
        del settings["vocab_size"]
        settings["sft_trains_embeddings"] = "false"
    elif course.vocabulary == "continue":
        settings["vocab_size"] = "100"
    told = configure("tiny", settings, write=False)
    compile_pipeline(told, work / "pipeline.yaml")
    result = run_pipeline(work / "pipeline.yaml", told.arguments, work / "run")
    assert result.exit_code == 0, result.error
    return result


def folder_of(result: RunResult, step: str) -> Path:
    return Path(open_artifact(result.reference(step)).root)


def loaded(folder: Path, **more: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval()


def encoder_of(folder: Path) -> Encoder:
    return load_encoder(open_artifact(str(folder)), "--model")


@torch.inference_mode()
def logits(model: Any, lines: list[list[int]]) -> torch.Tensor:
    return torch.cat([model(torch.tensor([ids])).logits[0] for ids in lines])


def trained(course: Course) -> tuple[str, str, str]:
    """The steps of the model that stage 2 begins with, and of stage 2."""
    begins = "convert_weights" if course.vocabulary == "keep" else "train_embeddings"
    return begins, "train_lora", "merge_lora"


def test_what_is_converted_and_extended_computes_what_the_base_does(
    course: Course, base: Path, adapted: RunResult, english_text: list[str]
) -> None:
    lines = [encoder_of(base).encode(line)[:100] for line in english_text[:20]]
    before = logits(loaded(base), lines)
    assert torch.equal(logits(loaded(folder_of(adapted, "convert_weights")), lines), before)
    if course.vocabulary != "keep":
        folder = folder_of(adapted, "extend_tokenizer")
        assert encoder_of(folder).encode_batch(english_text[:200]) == encoder_of(base).encode_batch(english_text[:200])
        pieces = encoder_of(base).size
        assert torch.equal(logits(loaded(folder), lines)[:, :pieces], before[:, :pieces])


def test_what_is_merged_computes_what_peft_does(course: Course, adapted: RunResult, chinese_text: list[str]) -> None:
    from peft import PeftModel

    begins, *stage2 = trained(course)
    for model, adapter, merged in ((begins, *stage2), ("merge_lora", "train_sft", "merge_sft")):
        folder = folder_of(adapted, merged)
        lines = [encoder_of(folder).encode(line)[:100] for line in chinese_text[:20]]
        beside = PeftModel.from_pretrained(loaded(folder_of(adapted, model)), folder_of(adapted, adapter)).eval()
        torch.testing.assert_close(logits(loaded(folder), lines), logits(beside, lines), rtol=1e-4, atol=1e-4)


def test_it_was_trained(course: Course, adapted: RunResult) -> None:
    begins, *_ = trained(course)
    first, last = (loaded(folder_of(adapted, step)).state_dict() for step in (begins, "merge_sft"))
    changed = {name for name, tensor in first.items() if not torch.equal(tensor, last[name])}
    assert any("q_proj" in name for name in changed)
    assert ("model.embed_tokens.weight" in changed) == (course.vocabulary != "keep")


@pytest.mark.gguf
def test_llama_cpp_encodes_and_computes_what_was_trained(
    adapted: RunResult, tmp_path: Path, chinese_text: list[str], english_text: list[str]
) -> None:
    import llama_cpp

    from components.export_model.exporter import export_model
    from components.export_model.options import ExportModel
    from components.serve.check import check_gguf
    from tests.components.export_model.test_gguf import logits as of_gguf
    from zhllama.stage.run import run_stage

    folder = folder_of(adapted, "merge_sft")
    config = ExportModel(store=str(tmp_path), model=str(folder), format="gguf", quantization="f32")
    path = Path(run_stage(config, export_model).root, "model-f32.gguf")
    check_gguf(path, None, "--model m.gguf")
    encoder = encoder_of(folder)
    lines = [encoder.encode(line)[:100] for line in [*chinese_text[:10], *english_text[:10]]]
    found, right = torch.cat(of_gguf(path, lines)), logits(loaded(folder), lines)
    assert float((found - right[:, : found.shape[1]]).norm() / right.norm()) < 2e-3
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    texts = [line for line in [*chinese_text, *english_text, *mixed_lines(500)] if line and "\0" not in line]
    texts = [line for line in texts if "\u0301" not in line]
    assert encoder.differing(texts, (model.tokenize(line.encode(), add_bos=True, special=False) for line in texts)) == 0
    model.close()


def test_transformers_encodes_as_in_training(adapted: RunResult, chinese_text: list[str]) -> None:
    from transformers import AutoTokenizer

    folder = folder_of(adapted, "merge_sft")
    encoder, theirs = encoder_of(folder), AutoTokenizer.from_pretrained(folder)
    texts = [line for line in [*chinese_text, *mixed_lines(500)] if line]
    assert encoder.differing(texts, (theirs(line)["input_ids"] for line in texts)) == 0
