"""Exams in the style of C-Eval and CMMLU: questions with lettered choices, read from CSV files that the user has.

Files are `<split>/<subject>.csv` (CMMLU) or `<split>/<subject>_<split>.csv` (C-Eval). `dev` holds the worked examples;
`val` is scored where it is there (C-Eval keeps the answers of its `test`), else `test`. Columns, in any case: question,
A, B, C and so on, answer; others are ignored. The letter with the greatest log-likelihood is the model's answer.
"""

import csv
import io
import string
from collections.abc import Iterator
from typing import Any, NamedTuple

from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError


class Question(NamedTuple):
    text: str
    choices: tuple[str, ...]
    answer: int
    """The index of the right one."""


class Subject(NamedTuple):
    name: str
    examples: tuple[Question, ...]
    questions: tuple[Question, ...]


class Exam(NamedTuple):
    name: str
    """Of its folder."""
    subjects: tuple[Subject, ...]
    """In the order of their names."""


def read_exam(artifact: Artifact, max_questions: int = 0) -> Exam:
    """The exam, or the first `max_questions` of each subject. InputError names what is wrong."""
    found: dict[str, dict[str, str]] = {}
    for name in sorted(artifact.names):
        *folders, file = name.split("/")
        if file.lower().endswith(".csv") and folders:
            split = folders[-1]
            found.setdefault(split, {})[file[: -len(".csv")].removesuffix(f"_{split}")] = name
    scored = found.get("val") or found.get("test")
    if scored is None:
        raise InputError(
            f"{artifact.root}: no questions in it; an exam has val/<subject>.csv or test/<subject>.csv, and "
            "dev/<subject>.csv for examples"
        )
    examples = found.get("dev", {})
    subjects = [
        Subject(
            subject,
            tuple(_questions(artifact, examples[subject])) if subject in examples else (),
            tuple(_questions(artifact, name))[: max_questions or None],
        )
        for subject, name in sorted(scored.items())
    ]
    return Exam(artifact.root.rstrip("/").rsplit("/", 1)[-1], tuple(subjects))


def _questions(artifact: Artifact, name: str) -> Iterator[Question]:
    where = f"{artifact.root}/{name}"
    try:
        text = artifact.read(name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 ({error.reason}); convert the file") from error
    rows = csv.reader(io.StringIO(text, newline=""))
    columns = [column.strip().lower() for column in next(rows, [])]
    letters = [letter for letter in string.ascii_uppercase if letter.lower() in columns]
    missing = [column for column in ("question", "a", "b", "answer") if column not in columns]
    if missing:
        raise InputError(f"{where}: no column {', '.join(missing)}; an exam's columns are question, A, B, C, D, answer")
    if twice := [letter for letter in letters if columns.count(letter.lower()) > 1]:
        raise InputError(f"{where}: the column {twice[0]} is there twice; mend its head")
    for place, row in _rows(rows, where):
        if len(row) != len(columns):
            raise InputError(f"{place} has {len(row)} fields for {len(columns)} columns; mend or remove it")
        value = dict(zip(columns, (field.strip() for field in row)))
        answer = value["answer"].upper()
        if answer not in letters:
            raise InputError(f"{place}: the answer {value['answer']!r} is none of {', '.join(letters)}; mend the row")
        yield Question(value["question"], tuple(value[letter.lower()] for letter in letters), letters.index(answer))


def _rows(rows: Any, where: str) -> Iterator[tuple[str, list[str]]]:
    """(its place, fields) of each row of a CSV reader that holds something."""
    try:
        for row in filter(None, rows):
            yield f"{where}: line {rows.line_num}", row
    except csv.Error as error:
        raise InputError(f"{where}: line {rows.line_num} cannot be read ({error}); mend or remove it") from error


def prompts(subject: Subject, question: Question, shots: int) -> list[str]:
    """The prompt with `shots` examples, then with one fewer each time: the first that fits is asked. The text ends
    where the letter is to follow."""
    head = f"以下是关于{subject.name.replace('_', ' ')}的单项选择题，请选出正确答案。\n\n"
    examples = [f"{_asked(one)}{letters(one)[one.answer]}\n\n" for one in subject.examples[:shots]]
    return [head + "".join(examples[start:]) + _asked(question) for start in range(len(examples) + 1)]


def _asked(question: Question) -> str:
    choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip(letters(question), question.choices))
    return f"{question.text}\n{choices}答案："


def letters(question: Question) -> str:
    return string.ascii_uppercase[: len(question.choices)]
