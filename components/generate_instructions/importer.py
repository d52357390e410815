"""Public data sets in their usual forms as items: every record is validated and compared like an answer.

Alpaca items (or prompt and completion, …) and conversations (zhllama/data/conversations.py) as JSON, JSONL and Parquet;
.gz and .zst too, and data sets of the Hub, streamed. A conversation is taken up to its last answer.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from components.generate_instructions.harvest import Harvest
from zhllama.artifacts import hub_dataset
from zhllama.artifacts.reader import Artifact
from zhllama.data.conversations import Item, item_of, turns_of
from zhllama.data.json_values import values_in
from zhllama.data.packed import HELD_OUT_INSTRUCTIONS
from zhllama.data.text_stream import data_files, parquet_batches
from zhllama.errors import InputError
from zhllama.progress import Progress

ENDINGS = (".json", ".jsonl", ".parquet")
QUESTIONS = ("instruction", "prompt", "question", "query", "指令", "问题")
INPUTS = ("input", "context", "输入")
ANSWERS = ("output", "response", "completion", "answer", "chosen", "输出", "回答", "答案")


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
    """The record as an item (not yet validated; what is wrong with it, for a conversation that none can be made of),
    and the form that it had."""
    if not isinstance(record, dict):
        return None, "unknown"
    if turns_of(record) is not None:
        return _conversation(record), "conversation"
    question, given, answer = (
        next((record[name] for name in names if record.get(name) is not None), None)
        for names in (QUESTIONS, INPUTS, ANSWERS)
    )
    if question is None:
        return record, "unknown"
    value = {"instruction": question, "input": given or "", "output": answer}
    more = {name: record[name] for name in ("system", "history") if record.get(name)}
    return _conversation(value | more) if more else value, "alpaca"


def _conversation(record: dict[str, Any]) -> Item | InputError:
    try:
        item = item_of(record, answered=False)
    except InputError as fault:
        return fault
    if not item["output"] and item.get("history"):
        item["instruction"], item["output"] = item["history"].pop()
        item["input"] = ""
    return item


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
