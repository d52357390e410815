"""What evaluate writes into `report.json`, and the same as a table for a terminal.

    {
      "models": [                         the baselines in the order given, then the model
        {"label", "reference", "digest", "pieces", "parameters",
         "tokens_per_character": {"zh", "en"},
         "bits_per_byte": {"zh", "en"},
         "next_token_accuracy": {"zh", "en"},
         "instructions": null or {
            "accuracy", "margin", "chance", "items",      multiple choice; margin: 95%, in the unit of accuracy
            "exact_match", "exact_match_items",           greedy decoding gives exactly the answer
            "answer_bits_per_byte", "too_long",           too_long: items that did not fit the model's positions
            "groups": [{"instruction", "choices", "items", "accuracy", "chance"}]}}],
      "texts": {"zh": null or {"reference", "documents", "bytes", "characters"}, "en": …},
      "samples": [{"kind": "instruction" | "text", "prompt", "expected",
                   "answers": {label: text}}],         a model whose positions the prompt fills is left out
      "trainings": [{"label", "reference", "points": [{"step", "loss", "eval_loss"}]}]
    }

A figure that was not measured is null. Shares are between 0 and 1.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

REPORT_JSON = "report.json"
UNMEASURED = "–"


def number(value: float | None, digits: int = 2) -> str:
    """`3.14`, or a dash for what was not measured."""
    return UNMEASURED if value is None else f"{value:,.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    """`73.4%`, or a dash for what was not measured."""
    return UNMEASURED if value is None else f"{value:.{digits}%}"


def table(report: Mapping[str, Any]) -> "Table":
    """The models side by side, one line each, for rich's console."""
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, title="held-out figures", title_justify="left")
    shown.add_column("model", style="bold")
    for heading in ("pieces", "tokens/char zh", "en", "bits/byte zh", "en", "next token zh", "accuracy", "chance"):
        shown.add_column(heading, justify="right")
    last = len(report["models"]) - 1
    for index, model in enumerate(report["models"]):
        scored = model["instructions"] or {}
        accuracy = percent(scored.get("accuracy"))
        if scored.get("margin") is not None:
            accuracy += f" ±{100 * scored['margin']:.1f}"
        shown.add_row(
            model["label"],
            f"{model['pieces']:,}",
            number(model["tokens_per_character"]["zh"]),
            number(model["tokens_per_character"]["en"]),
            number(model["bits_per_byte"]["zh"]),
            number(model["bits_per_byte"]["en"]),
            percent(model["next_token_accuracy"]["zh"]),
            accuracy,
            percent(scored.get("chance")),
            style="bold green" if index == last else None,
        )
    return shown
