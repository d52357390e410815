"""Public data sets in their usual forms as Alpaca items: every record is validated and compared like an answer.

Alpaca JSON and JSONL (and the same under other names: prompt and completion, question and answer, …), ShareGPT
conversations (conversations of from/value, or messages of role/content), and Parquet of either. Of a conversation the
first question and its answer are taken: an Alpaca item has one turn, and a later turn alone has lost what it answers.
Files may be .gz or .zst, and `hf://datasets/OWNER/NAME` is a data set of the Hub. Records are streamed.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from components.generate_instructions.harvest import Harvest
from zhllama.artifacts import hub_dataset
from zhllama.artifacts.reader import Artifact
from zhllama.data.instructions import NO_ITEMS
from zhllama.data.text_stream import lines_of, open_plain, plain_name
from zhllama.errors import InputError
from zhllama.progress import Progress

log = logging.getLogger("generate_instructions")

ENDINGS = (".json", ".jsonl", ".parquet")
ROWS = 1000
"""Of a Parquet file at a time."""
QUESTIONS = ("instruction", "prompt", "question", "query", "指令", "问题")
INPUTS = ("input", "context", "输入")
ANSWERS = ("output", "response", "completion", "answer", "chosen", "输出", "回答", "答案")
CONVERSATIONS = ("conversations", "conversation", "messages")
PEOPLE = {"human", "user", "prompter", "用户"}
MODELS = {"gpt", "assistant", "bot", "chatgpt", "bard", "bing", "model", "助手"}


def import_items(artifact: Artifact, harvest: Harvest) -> dict[str, int]:
    """Takes every record of the artifact's files, in order of name and place, into the harvest.

    Returns how many records there were, by form ("alpaca", "conversation", "unknown"). InputError for a file that
    cannot be read as what its name says; a record in it that is broken is counted, not fatal.
    """
    forms = {"alpaca": 0, "conversation": 0, "unknown": 0}
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
        return _first_turn(turns), "conversation"
    question = _first(record, QUESTIONS)
    if question is None:
        return record, "unknown"
    return {"instruction": question, "input": _first(record, INPUTS) or "", "output": _first(record, ANSWERS)}, "alpaca"


def _first(record: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


def _first_turn(turns: list[Any]) -> Any:
    """What a person said first and what the model answered; a system's words are left out."""
    said = [_said(turn) for turn in turns]
    said = [(who, text) for who, text in said if who != "system"]
    if len(said) < 2 or said[0][0] != "person" or said[1][0] != "model":
        return {"instruction": said[0][1] if said and said[0][0] == "person" else None, "input": "", "output": None}
    return {"instruction": said[0][1], "input": "", "output": said[1][1]}


def _said(turn: Any) -> tuple[str, Any]:
    """Who ("person", "model", "system") and what."""
    if not isinstance(turn, dict):
        return "", None
    who = str(turn.get("from") or turn.get("role") or "").lower()
    text = turn.get("value") if turn.get("value") is not None else turn.get("content")
    return ("person" if who in PEOPLE else "model" if who in MODELS else "system" if who == "system" else ""), text


def _all_records(artifact: Artifact) -> Iterator[Any]:
    """Every record; None for one that cannot be read."""
    if artifact.manifest.kind == hub_dataset.KIND:
        yield from hub_dataset.hub_rows(artifact)
        return
    names = sorted(name for name in artifact.names if plain_name(name).endswith(ENDINGS) and name not in NO_ITEMS)
    if not names:
        raise InputError(f"{artifact.root}: no {', '.join(ENDINGS)} file in it; give a data set in one of these")
    for name in names:
        where = f"{artifact.root}/{name}"
        if name.endswith(".parquet"):
            yield from _parquet(artifact, name, where)
        elif plain_name(name).endswith(".jsonl"):
            yield from _lines(artifact, name)
        else:
            yield from _json(artifact, name, where)


def _lines(artifact: Artifact, name: str) -> Iterator[Any]:
    return (_json_or_none(line) for line in lines_of(artifact, name) if line.strip())


def _holds_lines(artifact: Artifact, name: str) -> bool:
    """Whether a .json file is JSON lines, as many data sets have it: its first line is a record, or the second is one
    like it. Reads two lines, however long they are."""
    first = list(islice(_lines(artifact, name), 2))
    return all(isinstance(value, dict) for value in first) and (
        len(first) == 2 or (len(first) == 1 and alpaca_of(first[0])[1] != "unknown")
    )


def _json(artifact: Artifact, name: str, where: str) -> Iterator[Any]:
    """The members of a list; of an object ({"data": […]}, or splits by name) those of its lists; or its lines."""
    import ijson

    with open_plain(artifact, name) as stream:
        try:
            if stream.peek(3).startswith(b"\xef\xbb\xbf"):
                stream.read(3)
            begin = stream.peek(4096).lstrip()[:1]
            # a list first: all of it may be one line, which is not read to see that it is none
            if begin == b"[":
                yield from ijson.items(stream, "item", use_float=True)
            elif _holds_lines(artifact, name):
                yield from _lines(artifact, name)
            elif begin == b"{":
                for _, value in ijson.kvitems(stream, "", use_float=True):
                    yield from value if isinstance(value, list) else ()
            else:
                raise InputError(f"{where}: not JSON; give a list of objects, or one a line as .jsonl")
        except ijson.JSONError as error:
            raise InputError(f"{where}: not JSON ({error}); give a list of objects, or one a line as .jsonl") from error
        except OSError as error:
            if plain_name(name) == name:
                raise
            raise InputError(f"{where}: cannot be decompressed ({error}); compress it again") from error


def _json_or_none(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


def _parquet(artifact: Artifact, name: str, where: str) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    try:
        with artifact.open(name) as stream:
            for batch in parquet.ParquetFile(stream).iter_batches(batch_size=ROWS):
                yield from batch.to_pylist()
    # OSError is what pyarrow raises for a damaged page
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{where}: not a Parquet file that can be read ({error}); fetch it again") from error
