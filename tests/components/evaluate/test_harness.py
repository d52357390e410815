"""lm-evaluation-harness as a back end, on a task of the tests' own with local data: its score is the plain one."""

import json
from pathlib import Path

import pytest

from components.evaluate.harness import check_tasks, run_tasks
from zhllama.errors import InputError
from zhllama.inference.load import LoadedModel

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'zhllama[lm-eval]'")

TASK = """\
task: zh_judge
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["好", "坏"]
doc_to_target: answer
metric_list:
  - metric: acc
"""


@pytest.fixture
def tasks(tmp_path: Path, chinese_text: list[str]) -> Path:
    rows = [{"text": text[:10], "answer": index % 2} for index, text in enumerate(chinese_text[:10])]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "zh_judge.yaml").write_text(TASK.format(data=data))
    return folder


@pytest.mark.slow
def test_a_task_of_ones_own_is_scored(
    loaded: LoadedModel, tasks: Path, chinese_text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    check_tasks(["zh_judge"], tasks)
    figures = run_tasks(loaded, ["zh_judge"], tasks, 0)["zh_judge"]
    right = 0
    for index, text in enumerate(chinese_text[:10]):
        values = []
        for answer in ("好", "坏"):
            # the harness puts a space between text and answer
            prompt = loaded.prompt_ids(text[:10])
            whole = loaded.prompt_ids(f"{text[:10]} {answer}")
            with torch.inference_mode():
                logits = loaded.model(torch.tensor([whole])).logits[0].log_softmax(-1)
            values.append(sum(logits[at - 1, whole[at]].item() for at in range(len(prompt), len(whole))))
        right += values.index(max(values)) == index % 2
    assert figures["acc,none"] == pytest.approx(right / 10)


@pytest.mark.slow
def test_an_unknown_task_is_refused_before_a_model_is_loaded(tasks: Path) -> None:
    with pytest.raises(InputError, match="--lm-eval no_such_task: the harness knows no such task"):
        check_tasks(["no_such_task"], tasks)
