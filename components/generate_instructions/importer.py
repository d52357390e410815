"""Public data sets in their usual forms as Alpaca items: every record is validated and compared like an answer.

Alpaca items (or prompt and completion, …) and ShareGPT conversations (from/value, or messages of role/content) as JSON,
JSONL and Parquet; .gz and .zst too, and data sets of the Hub, streamed. Of a conversation the first question and its
answer are taken: a later turn alone has lost what it answers.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from components.generate_instructions.harvest import Harvest
from zhllama.artifacts import hub_dataset
from zhllama.artifacts.reader import Artifact
from zhllama.data.json_values import values_in
from zhllama.data.packed import HELD_OUT_INSTRUCTIONS
from zhllama.data.text_stream import data_files, parquet_batches
from zhllama.progress import Progress

ENDINGS = (".json", ".jsonl", ".parquet")
QUESTIONS = ("instruction", "prompt", "question", "query", "指令", "问题")
INPUTS = ("input", "context", "输入")
ANSWERS = ("output", "response", "completion", "answer", "chosen", "输出", "回答", "答案")
CONVERSATIONS = ("conversations", "conversation", "messages")
ROLES = {
    **dict.fromkeys(("human", "user", "prompter", "用户"), "person"),
    **dict.fromkeys(("gpt", "assistant", "bot", "chatgpt", "bard", "bing", "model", "助手"), "model"),
    "system": "system",
}


def import_items(artifact: Artifact, harvest: Harvest) -> Mapping[str, int]:
    """Takes every record, in order of file name and place; returns how many there were by form. InputError for a file
    that cannot be read as what its name says; a broken record is counted, not fatal."""
    forms = Counter({"alpaca": 0, "conversation": 0, "unknown": 0})
    with Progress("importing", None, "records") as bar:
        for record in _all_records(artifact):
            if harvest.full:
                break
            value, form = alpaca_of(record)
            forms[form] += 1
            harvest.take(value)
            bar.advance(1)
    return forms


def alpaca_of(record: Any) -> tuple[Any, str]:
    """The record as an Alpaca item (not yet validated), and the form that it had."""
    if not isinstance(record, dict):
        return record, "unknown"
    turns = next((record[name] for name in CONVERSATIONS if isinstance(record.get(name), list)), None)
    if turns is not None:
        # what a person said first and what the model answered; a system's words are left out
        said = [one for one in map(_said, turns) if one[0] != "system"]
        asked = said[0][1] if said and said[0][0] == "person" else None
        answered = said[1][1] if asked is not None and len(said) > 1 and said[1][0] == "model" else None
        return {"instruction": asked, "input": "", "output": answered}, "conversation"
    question, given, answer = (
        next((record[name] for name in names if record.get(name) is not None), None)
        for names in (QUESTIONS, INPUTS, ANSWERS)
    )
    if question is None:
        return record, "unknown"
    return {"instruction": question, "input": given or "", "output": answer}, "alpaca"


def _said(turn: Any) -> tuple[str, Any]:
    """Who ("person", "model", "system") and what."""
    if not isinstance(turn, dict):
        return "", None
    text = turn.get("value") if turn.get("value") is not None else turn.get("content")
    return ROLES.get(str(turn.get("from") or turn.get("role") or "").lower(), ""), text


def _all_records(artifact: Artifact) -> Iterator[Any]:
    """Every record; what is no object for one that cannot be read."""
    if artifact.manifest.kind == hub_dataset.KIND:
        yield from hub_dataset.hub_rows(artifact)
    missing = f"no {', '.join(ENDINGS)} file in it; give a data set in one of these"
    for name in data_files(artifact, ENDINGS, HELD_OUT_INSTRUCTIONS, "instructions", missing):
        if name.endswith(".parquet"):
            for batch in parquet_batches(artifact, name):
                yield from batch.to_pylist()
        else:
            needed = "a list of objects, or one a line, is needed"
            found = values_in(artifact, name, needed, lambda one: alpaca_of(one)[1] != "unknown", lists=True)
            yield from (value for _, value in found)
