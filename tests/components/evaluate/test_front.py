"""The front: a point is the model that merge_models publishes, to the bit; what is required of English chooses one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from components.evaluate.evaluate import evaluate
from components.evaluate.front import choose
from components.evaluate.options import Evaluate
from components.merge_models.merger import merge_models
from components.merge_models.options import MergeModels
from tests.loaded_model import load_model
from tests.small_models import save
from zhllama.artifacts.json_file import value_of
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.open import open_artifact
from zhllama.errors import InputError
from zhllama.inference.between import go_between
from zhllama.stage.requirements import parse_requirements
from zhllama.stage.run import run_stage
from zhllama.tokenizer.sentencepiece_model import parse_model
from zhllama.weights.blend_plan import Source, plan_blend

LABELS = ("base", "judge")


def options(held_out: Path, store: Path, **more: Any) -> Evaluate:
    given = {"text": str(held_out / "zh"), "english": str(held_out / "en"), "samples": 0, "max_prompts": 0}
    return Evaluate(**{**given, "max_bytes": 2000, "store": str(store), **more})


def measured(config: Evaluate) -> dict[str, Any]:
    return dict(value_of(open_artifact(run_stage(config, evaluate).reference).read("report.json")))


def merged(store: Path, model: str, other: str, weight: float) -> Manifest:
    return run_stage(MergeModels(store=str(store), model=model, other=other, weight=weight), merge_models)


def test_a_point_is_measured_as_the_model_that_merge_models_publishes(
    held_out: Path, tiny_model: str, judge: Path, tmp_path: Path
) -> None:
    config = options(held_out, tmp_path, model=str(judge), baseline=tiny_model, labels="base,judge", front=3)
    report = measured(config)
    points = {point["weight"]: point["bits_per_byte"] for point in report["front"]["points"]}
    assert list(points) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert (points[0.0], points[1.0]) == tuple(model["bits_per_byte"] for model in reversed(report["models"]))
    assert report["front"]["chosen"] == 0.0
    alone = measured(options(held_out, tmp_path, model=merged(tmp_path, str(judge), tiny_model, 0.25).reference))
    assert points[0.25] == alone["models"][0]["bits_per_byte"]
    assert points[0.25] not in (points[0.0], points[0.5])


def test_the_weights_are_those_of_merge_models_where_the_model_has_more_pieces(
    llama_tokenizer: bytes, tmp_path: Path
) -> None:
    proto = parse_model(llama_tokenizer)
    for index, piece in enumerate("甲乙丙丁戊"):
        proto.pieces.add(piece=piece, score=-40_000.0 - index)
    base = save(tmp_path / "base", "qwen2", llama_tokenizer)
    model = save(tmp_path / "model", "qwen2", proto.SerializeToString(), vocab_size=805, initializer_range=0.2)
    loaded = load_model(str(model))
    plan = plan_blend([Source(open_artifact(str(path)), "--model") for path in (model, base)])
    for weight in (0.3, 0.0, 1.0):
        go_between(loaded, plan, weight)
        wanted = load_model(
            merged(tmp_path / "store", str(model), str(base), weight).reference if weight else str(model)
        )
        for name, tensor in wanted.model.state_dict().items():
            assert torch.equal(loaded.model.state_dict()[name], tensor), name


def test_what_is_required_of_english_chooses_and_the_page_says_so(
    held_out: Path, tiny_model: str, judge: Path, tmp_path: Path
) -> None:
    """The judge knows less of both: some way back to the base is better in both."""
    given = {"model": str(judge), "baseline": tiny_model, "labels": "base,judge", "front": 1}
    report = measured(options(held_out, tmp_path, **given, require="english_bits_per_byte<=9*base"))
    best = min(report["front"]["points"], key=lambda point: point["bits_per_byte"]["zh"])
    assert report["front"]["chosen"] == best["weight"]
    assert best["weight"] > 0
    pages = [path.read_text("utf-8") for path in tmp_path.glob("evaluate/*/report.html")]
    # what was measured is published on its own, and requires nothing
    assert sorted("within what is required" in page for page in pages) == [False, True]


POINTS = st.lists(
    st.tuples(st.floats(0.5, 4), st.floats(0.5, 4)), min_size=2, max_size=7
).map(lambda found: [
    {"weight": at / (len(found) - 1), "bits_per_byte": {"zh": zh, "en": en}} for at, (zh, en) in enumerate(found)
])  # fmt: skip


@given(points=POINTS, bound=st.floats(0.5, 2))
def test_the_chosen_point_has_the_best_chinese_of_those_that_hold(points: list[dict[str, Any]], bound: float) -> None:
    base = points[-1]["bits_per_byte"]["en"]
    requirements = parse_requirements(f"english_bits_per_byte<={bound:.6f}*base,accuracy?>=2")
    figures = [{"bits_per_byte_en": base}, {"bits_per_byte_en": points[0]["bits_per_byte"]["en"]}]
    chosen = choose({"points": points, "chosen": 0.0}, requirements, LABELS, figures)["chosen"]
    held = [point for point in points if point["bits_per_byte"]["en"] <= float(f"{bound:.6f}") * base]
    if not held:
        assert chosen is None
    else:
        (found,) = (point for point in held if point["weight"] == chosen)
        assert found["bits_per_byte"]["zh"] == min(point["bits_per_byte"]["zh"] for point in held)


def test_without_a_requirement_on_english_the_model_stays_chosen() -> None:
    front = {"points": [{"weight": 0.0, "bits_per_byte": {"zh": 2, "en": 9}}], "chosen": 0.0}
    assert choose(front, parse_requirements("accuracy>=0.5"), LABELS, [{}, {"accuracy": 0.9}]) == front


@pytest.mark.parametrize("lacking", ["baseline", "text", "english"])
def test_a_front_needs_a_baseline_and_both_texts(held_out: Path, tmp_path: Path, lacking: str) -> None:
    given = {"model": "m", "baseline": "b", "front": 2, lacking: ""}
    with pytest.raises(InputError, match=rf"--front .* give --{lacking}"):
        options(held_out, tmp_path, **given)


def test_a_baseline_of_more_pieces_and_one_of_another_shape_are_refused_before_a_model_is_loaded(
    held_out: Path, llama_tokenizer: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.evaluate.evaluate.measure", lambda *_: pytest.fail("a model is measured"))
    proto = parse_model(llama_tokenizer)
    proto.pieces.add(piece="甲", score=-40_000.0)
    small = save(tmp_path / "small", "mistral", llama_tokenizer)
    large = save(tmp_path / "large", "mistral", proto.SerializeToString(), vocab_size=801)
    other = save(tmp_path / "other", "qwen3", llama_tokenizer)
    with pytest.raises(InputError, match="has more pieces than --model"):
        run_stage(options(held_out, tmp_path / "s", model=str(small), baseline=str(large), front=1), evaluate)
    with pytest.raises(InputError, match="model_type is qwen3"):
        run_stage(options(held_out, tmp_path / "s", model=str(small), baseline=str(other), front=1), evaluate)
