"""What a program saw beside what we say, and what it saved, back through our own commands: rows of the table."""

import json
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.compat.artifacts import ANSWER, CHATS, HALF, LINES, Said, log_softmax, logits_of, said, template_of
from tests.compat.inside import gguf
from tests.loaded_model import load_model
from zhllama.artifacts.open import open_artifact
from zhllama.errors import InputError
from zhllama.stage.run import run_stage

ROUNDING = {"float32": 2e-3, "f16": 3e-2, "q8_0": 0.5}
"""The most that a logit may differ: the logits of these models reach 20."""

MERGED = 1e-6
"""The most by which a weight of a merge in float32 may differ, as a share of its tensor's greatest: some last bits."""


@dataclass(frozen=True)
class Row:
    tried: str
    result: str
    differs: bool = False


class Comparison:
    """Holds a program's findings against ours. made: name → reference; ours: name → what we say."""

    def __init__(self, made: Mapping[str, str], ours: Mapping[str, Said], scratch: Path) -> None:
        self._made, self._ours, self._store = made, ours, str(scratch / "back")

    def rows(self, found: Mapping[str, Any], known: Mapping[str, str]) -> list[Row]:
        """known: what was tried, of any model or of one → why it differs, so that it does so with a word."""
        rows = []
        for seen in found["seen"]:
            tried = f"{seen['what']}: {seen['of']}"
            if "error" in seen:
                rows.append(Row(tried, f"error: {seen['error']}"))
                continue
            row = self._held(tried, seen)
            if row.differs and (why := known.get(seen["what"]) or known.get(tried)):
                row = Row(tried, f"{why}: {row.result}")
            if "saved" in seen:
                back = self._back(tried, seen)
                row = Row(tried, f"{row.result} {back.result}".strip(), row.differs or back.differs)
            rows.append(row)
        return rows

    def _held(self, tried: str, seen: Mapping[str, Any]) -> Row:
        ours, words, differs = self._ours[seen["of"]], [], False
        precision = seen.get("precision", "float32")
        # a greedy answer of a quantised model may be another
        greedy = ("answers", "spoken") if precision != "q8_0" else ()
        for name in ("ids", "probe", "chats", *greedy):
            if name in seen and (mine := getattr(ours, name)):
                same = sum(whole(one) == whole(two) for one, two in zip(seen[name], mine, strict=True))
                words.append(f"{name} {same:,}/{len(mine):,}")
                differs |= same != len(mine)
        if "tensors" in seen:
            equal, of, most = seen["tensors"]
            words.append(f"our merge: {equal}/{of} tensors to the bit, the others ±{most:.1e} of the greatest weight")
            differs |= not most <= MERGED
        # a row that no token names is padding, and no GGUF has it
        named = ours.pieces if seen["what"].startswith("GGUF") else None
        logits = [one[:, :named] for one in ours.logits]
        figures = {
            "logits": logits,
            "next": [log_softmax(one[-1]) for one in logits],
            "likelihood": [np.array(ours.likelihood)],
        }
        alike = logits[0].shape == ours.logits[0].shape
        if greedy and alike and "chosen" in seen and [*map(whole, seen["spoken"])] == [*map(whole, ours.spoken)]:
            # some tell EOS's too, some do not
            figures["chosen"] = [np.array(ours.chosen[at][: len(one)]) for at, one in enumerate(arrays(seen["chosen"]))]
        for name, values in figures.items():
            if name in seen and "saved" not in seen:
                pairs = zip(arrays(seen[name]), values, strict=True)
                told = [(one, two) for one, two in pairs if not np.isnan(one).all()]
                most = difference([one for one, _ in told], [two for _, two in told])
                words.append(f"{name} ±{most:.1e}")
                differs |= not most <= ROUNDING[precision]
        return Row(tried, ", ".join(words), differs)

    def _back(self, tried: str, seen: Mapping[str, Any]) -> Row:
        """Of what was saved: merged where it is an adapter, loaded, asked, evaluated and exported by our stages."""
        from components.merge_adapters.merger import merge_adapters
        from components.merge_adapters.options import MergeAdapters

        saved, steps, differs = seen["saved"], [], False

        def merged() -> tuple[str, bool]:
            nonlocal saved
            options = MergeAdapters(store=self._store, model=base, adapters=seen["saved"])
            saved = run_stage(options, merge_adapters).reference
            return self._read(seen, saved)

        ways: dict[str, Callable[[], tuple[str, bool]]] = {"load": lambda: self._read(seen, saved)}
        if seen["kind"] == "adapter":
            base = self._made[seen["base"]]
            ways = {"--adapters": lambda: self._read(seen, base, seen["saved"]), "merge_adapters": merged}
        ways |= {
            "evaluate": lambda: self._evaluated(saved),
            "generate": lambda: self._generated(saved),
            "export_model": lambda: self._exported(seen, saved),
        }
        for name, way in ways.items():
            try:
                words, other = way()
            except InputError as error:
                words, other = f"refused: {error}", True
            except Exception as error:  # noqa: BLE001 - a fault of ours is a row, and the others are tried
                traceback.print_exc()
                words, other = f"failed: {type(error).__name__}: {error}"[:300], True
            steps.append(f"{name}: {words}")
            differs |= other
            if name == "merge_adapters" and saved == seen["saved"]:
                break
        return Row(tried, "→ " + "; ".join(steps), differs)

    def _read(self, seen: Mapping[str, Any], model: str, adapters: str = "") -> tuple[str, bool]:
        """Its ids beside ours, its logits beside the program's."""
        ours, loaded = self._ours[seen["of"]], load_model(model, adapters)
        same = sum(loaded.prompt_ids(line) == mine for line, mine in zip(LINES, ours.ids, strict=True))
        most = difference(arrays(seen["logits"]), logits_of(loaded, ours.texts))
        return f"ids {same}/{len(LINES)}, logits ±{most:.1e}", same != len(LINES) or not most <= self._rounding(
            seen, model
        )

    def _rounding(self, seen: Mapping[str, Any], model: str) -> float:
        """A merge rounds to its base's float16."""
        merged = seen["kind"] == "adapter" and model != self._made[seen["base"]]
        return ROUNDING["f16" if merged and seen["base"] in HALF else "float32"]

    def _evaluated(self, model: str) -> tuple[str, bool]:
        from components.evaluate.evaluate import evaluate
        from components.evaluate.options import Evaluate

        text = {"text": self._made["text"], "max_bytes": 4000, "max_prompts": 1, "samples": 1}
        metrics = run_stage(Evaluate(store=self._store, model=model, **text), evaluate).metrics
        return ", ".join(f"{name} {value:.3f}" for name, value in metrics.items() if "bits" in name), not metrics

    def _generated(self, model: str) -> tuple[str, bool]:
        """The command's greedy answer beside the best of each step's logits."""
        from components.generate.generate import generate
        from components.generate.options import Generate

        loaded = load_model(model)
        mine = said(loaded, template_of(model)).answers[0]
        greedy = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": ANSWER}
        options = Generate(store=self._store, model=model, prompt=CHATS[0][0]["content"], **greedy)
        (sample,) = json.loads(open_artifact(run_stage(options, generate).reference).read("samples.json"))
        expected = loaded.encoder.decode([index for index in mine if index not in loaded.stops])
        return f"answer {expected == sample['Output']:d}/1", expected != sample["Output"]

    def _exported(self, seen: Mapping[str, Any], model: str) -> tuple[str, bool]:
        """As llama.cpp reads it, beside the program's logits."""
        from components.export_model.exporter import export_model
        from components.export_model.options import ExportModel

        options = ExportModel(store=self._store, model=model, format="gguf", quantization="f32")
        engine = gguf.opened(str(Path(run_stage(options, export_model).reference).with_name("model-f32.gguf")))
        ours = self._ours[seen["of"]]
        same = sum(one == two for one, two in zip(gguf.ids(engine, LINES), ours.ids, strict=True))
        # a row that no token names is padding, and no GGUF has it
        pieces = load_model(model).encoder.size
        most = difference([one[:, :pieces] for one in arrays(seen["logits"])], gguf.logits(engine, ours.texts))
        return f"ids {same}/{len(LINES)}, logits ±{most:.1e}", same != len(LINES) or not most <= self._rounding(
            seen, model
        )


def whole(said: Any) -> Any:
    """A text without the mark for bytes that are no character, which some programs write and some leave out; anything
    else as it is."""
    return said.replace("\ufffd", "") if isinstance(said, str) else said


def arrays(path: str) -> list[np.ndarray]:
    with np.load(path) as file:
        return [file[f"arr_{index}"] for index in range(len(file.files))]


def difference(theirs: list[np.ndarray], ours: list[np.ndarray]) -> float:
    """Between logits of the same texts; infinite for other shapes, NaN where one is none."""
    if [one.shape for one in theirs] != [one.shape for one in ours]:
        return float("inf")
    return float(np.max([np.abs(one - two).max() for one, two in zip(theirs, ours, strict=True)]))
