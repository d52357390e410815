"""The table of figures in a terminal: a column each model, no line without a figure."""

from typing import Any

from rich.console import Console

from zhllama.stage.report_figures import figures_table


def shown(models: list[dict[str, Any]]) -> str:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(figures_table("T", models))
    return captured.get()


def test_a_line_each_figure_that_some_model_has() -> None:
    exam = {"exam": "ceval", "shots": 5, "chance": 0.25}
    models = [
        {
            "label": label, "pieces": 32000, "bits_per_byte": {"zh": bits, "en": None}, "instructions": None,
            "exams": [{**exam, "accuracy": right}], "lm_eval": {"task": {"acc,none": right}},
        }
        for label, bits, right in (("base", 3.5, None), ("adapted", None, 0.5))
    ]  # fmt: skip
    lines = {line.strip().split("  ")[0]: line.split() for line in shown(models).splitlines() if line.strip()}
    assert lines["bits per byte, Chinese"][-2:] == ["3.500", "–"]
    assert lines["ceval, 5 shots"][-2:] == ["–", "50.0%"]
    assert lines["task, acc"][-2:] == ["–", "0.500"]
    assert "bits per byte, English" not in lines
    assert "accuracy" not in lines
