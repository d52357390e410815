"""Exams: both layouts are read, the letters are scored as a plain forward has them, what is wrong is named."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from components.evaluate.exams import Question, Subject, letters, prompts, read_exam
from components.evaluate.scoring import _fitting_rows, score_exam
from zhllama.artifacts.open import open_artifact
from zhllama.errors import InputError
from zhllama.inference.load import LoadedModel

HEAD = "id,question,A,B,C,D,answer,explanation\n"


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")
    return folder


def ceval(folder: Path, questions: int = 6) -> Path:
    rows = "".join(f'{n},"第{n}题，哪个对？",甲{n},乙{n},"丙, {n}",丁{n},{"ABCD"[n % 4]},\n' for n in range(questions))
    return write(
        folder,
        {
            "dev/high_school_history_dev.csv": HEAD + "0,例题？,甲,乙,丙,丁,C,因为\n1,例题二？,一,二,三,四,A,\n",
            "val/high_school_history_val.csv": HEAD + rows,
            "val/law_val.csv": HEAD + rows,
            "test/law_test.csv": "id,question,A,B,C,D\n0,没有答案,甲,乙,丙,丁\n",
        },
    )


def test_c_evals_layout_is_read(tmp_path: Path) -> None:
    exam = read_exam(open_artifact(str(ceval(tmp_path / "ceval")), "--exams"))
    assert exam.name == "ceval"
    history, law = exam.subjects
    assert (history.name, law.name) == ("high_school_history", "law")
    assert history.examples[0] == Question("例题？", ("甲", "乙", "丙", "丁"), 2)
    assert history.questions[1] == Question("第1题，哪个对？", ("甲1", "乙1", "丙, 1", "丁1"), 1)
    assert law.examples == ()


def test_cmmlus_layout_is_read(tmp_path: Path) -> None:
    text = ",Question,A,B,C,D,Answer\n0,问？,甲,乙,丙,丁,b\n1,又问？,甲,乙,丙,丁,D\n"
    exam = read_exam(open_artifact(str(write(tmp_path, {"dev/arts.csv": text, "test/arts.csv": text})), "--exams"), 1)
    (arts,) = exam.subjects
    assert [question.answer for question in arts.examples] == [1, 3]
    assert [question.answer for question in arts.questions] == [1]  # as many as were asked for


def test_examples_come_first_and_the_first_is_dropped_first() -> None:
    example = [Question(f"例{n}", ("是", "否"), n) for n in range(2)]
    subject = Subject("world_history", tuple(example), ())
    full, one, none = prompts(subject, Question("问", ("对", "错"), 0), 5)
    assert full.endswith("例0\nA. 是\nB. 否\n答案：A\n\n例1\nA. 是\nB. 否\n答案：B\n\n问\nA. 对\nB. 错\n答案：")
    assert "例0" not in one
    assert "例1" in one
    assert none == "以下是关于world history的单项选择题，请选出正确答案。\n\n问\nA. 对\nB. 错\n答案："
    assert prompts(subject, Question("问", ("对", "错"), 0), 0) == [none]


def plain_choice(loaded: LoadedModel, text: str, count: int) -> int:
    """The likeliest letter, by transformers' own forward over the whole text with each letter."""
    import torch

    ends = [loaded.prompt_ids(text + "ABCD"[index]) for index in range(count)]
    with torch.inference_mode():
        values = [loaded.model(torch.tensor([ids])).logits[0, -2].log_softmax(-1)[ids[-1]].item() for ids in ends]
    return values.index(max(values))


def test_an_exam_is_scored_as_plain_forwards_score_it(loaded: LoadedModel, tmp_path: Path) -> None:
    exam = read_exam(open_artifact(str(ceval(tmp_path / "ceval")), "--exams"))
    for shots in (0, 2):
        expected = [
            sum(
                plain_choice(loaded, prompts(subject, question, shots)[0], 4) == question.answer
                for question in subject.questions
            )
            for subject in exam.subjects
        ]
        score = score_exam(loaded, exam, shots, "exam")
        assert score["too_long"] == 0
        assert [subject["items"] for subject in score["subjects"]] == [6, 6]
        assert [subject["accuracy"] for subject in score["subjects"]] == [right / 6 for right in expected]


def test_a_letter_is_encoded_where_it_stands(loaded: LoadedModel) -> None:
    question = Question("问", ("对", "错", "不知"), 0)
    text = prompts(Subject("s", (), ()), question, 0)[0]
    (row,) = _fitting_rows(loaded, [text], letters(question))
    for number, choice in enumerate("ABC"):
        answer = [target for target, owner in zip(row.targets, row.owner) if owner == number]
        shared = row.ids[: row.segments.count(0)]
        assert shared + answer == loaded.prompt_ids(text + choice)


def test_examples_are_left_out_until_it_fits_and_what_never_fits_is_counted(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    exam = read_exam(open_artifact(str(ceval(tmp_path / "ceval", 3)), "--exams"))
    history = exam.subjects[0]
    widths = [len(loaded.prompt_ids(text)) for text in prompts(history, history.questions[0], 2)]
    narrow = dataclasses.replace(loaded, positions=widths[1] + 3)
    (row,) = [next(_fitting_rows(narrow, prompts(history, history.questions[0], 2), letters(history.questions[0])))]
    assert len(row.ids) < narrow.positions
    assert score_exam(narrow, exam, 2, "exam")["subjects"][0]["items"] == 3
    tiny = dataclasses.replace(loaded, positions=12)
    score = score_exam(tiny, exam, 2, "exam")
    assert (score["items"], score["too_long"]) == (0, 6)
    assert [(subject["items"], subject["accuracy"]) for subject in score["subjects"]] == [(0, None), (0, None)]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"questions.csv": HEAD}, r"no questions in it; an exam has val/<subject>\.csv"),
        ({"dev/a.csv": HEAD}, "no questions in it"),
        ({"val/a_val.csv": "id,question,A,B\n"}, r"val/a_val\.csv: no column answer"),
        ({"val/a.csv": HEAD + "0,问,甲,乙,丙,丁,E,\n"}, "line 2: the answer 'E' is none of A, B, C, D"),
        ({"val/a.csv": HEAD + "0,问,甲\n"}, "line 2 has 3 fields for 8 columns"),
        ({"val/a.csv": ""}, "no column question"),
        ({"val/a.csv": HEAD + f"0,{'问' * 200_000},甲,乙,丙,丁,A,\n"}, "line 2 cannot be read .field larger"),
        ({"val/a.csv": "question,A,A,B,answer\n"}, "the column A is there twice"),
    ],
    ids=[
        "no split",
        "examples only",
        "no answers",
        "a strange answer",
        "a short row",
        "an empty file",
        "a field of a novel",
        "a column twice",
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, files: dict[str, str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_exam(open_artifact(str(write(tmp_path / "exam", files)), "--exams"))


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    folder: Any = write(tmp_path, {"val/a.csv": ""})
    (folder / "val/a.csv").write_bytes(b"question,A,B,answer\n\xff,1,2,A\n")
    with pytest.raises(InputError, match=r"val/a\.csv: not UTF-8"):
        read_exam(open_artifact(str(folder), "--exams"))
