"""Conversations as instruction items, whatever form they come in: one reader for every stage.

Three forms are read: messages of {"role", "content"} (OpenAI's), turns of {"from", "value"} (ShareGPT's), and an Alpaca
item with `history` ([instruction, answer] pairs before it) and `system`. An item has the last form ever after: its
`instruction` is the last question and its `output` the last answer, so that what knows items alone reads it too.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from zhllama.errors import InputError
from zhllama.tokenizer.prompt import question_of


class Item(dict[str, Any]):
    """`instruction`, `input` and `output`, texts; `system`, a text, and `history`, a list of [question, answer], where
    it has them."""

    place = ""
    """Where it was read."""


FIELDS = ("instruction", "input", "output")
LISTS = ("conversations", "conversation", "messages")
"""Fields that a list of turns stands in."""
MOST_TURNS = 2_000
"""As many as the gateway takes: a template is asked for each."""
ROLES = {
    **dict.fromkeys(("human", "user", "prompter", "用户"), "user"),
    **dict.fromkeys(("gpt", "assistant", "bot", "chatgpt", "bard", "bing", "model", "助手"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
_TOOLS = ("tool", "function", "function_call", "tool_call", "tool_calls", "tool_response", "observation", "ipython")
_BESIDE = {
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call", "tool_call_id"), "tool calls"),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "what is no text"),
    **dict.fromkeys(("reasoning", "reasoning_content", "thinking"), "reasoning beside an answer"),
}
"""Fields of an item or a turn that hold more than it says."""
_LEARNED = ("weight", "loss", "train", "training")
"""Fields of a turn by which other programs leave an answer unlearned."""


def turns_of(record: Mapping[str, Any]) -> list[Any] | None:
    """The turns of a record in messages form; None for one in Alpaca's."""
    return next((record[name] for name in LISTS if isinstance(record.get(name), list)), None)


def messages_of(item: Mapping[str, Any]) -> list[dict[str, str]]:
    """What is said before an item's answer, as a server is sent it."""
    system, found = item.get("system"), []
    for asked, answered in item.get("history") or ():
        found += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    found.append({"role": "user", "content": question_of(item)})
    return [{"role": "system", "content": system}, *found] if system else found


def texts_of(item: Mapping[str, Any]) -> Iterator[str]:
    """Every text of an item, in the order in which it is said."""
    if item.get("system"):
        yield item["system"]
    for pair in item.get("history") or ():
        yield from pair
    yield from (item[name] for name in FIELDS)


def is_conversation(item: Mapping[str, Any]) -> bool:
    """Whether an item says more than one question and its answer."""
    return bool(item.get("history") or item.get("system"))


def item_of(record: Mapping[str, Any], answered: bool = True) -> Item:
    """The item that a record is. InputError, without the record's place, for one that none can be made of, or that
    lacks an answer where it has to be `answered`."""
    _refuse_more(record, "it")
    turns = turns_of(record)
    item = _of_fields(record, answered) if turns is None else _of_turns(turns, record.get("system"), answered)
    try:
        "".join(texts_of(item)).encode()
    except UnicodeEncodeError as error:
        raise InputError("it has half of a surrogate pair; mend the item") from error
    return item


def _of_fields(record: Mapping[str, Any], answered: bool) -> Item:
    optional = ("input",) if answered else ("input", "output")
    found = Item()
    for name in FIELDS:
        value = record.get(name)
        if value is None and name in optional:
            value = ""
        if not isinstance(value, str):
            raise InputError(f"field {name!r} is {'missing' if value is None else 'not text'}; mend the item")
        if not value.strip() and name not in optional:
            raise InputError(f"field {name!r} is empty; mend or remove the item")
        found[name] = value
    system, history = record.get("system"), record.get("history")
    if system:
        found["system"] = _said(system, "field 'system'")
    if history:
        if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
            raise InputError("field 'history' is no list of [instruction, answer] pairs; mend the item")
        _refuse_many(2 * len(history) + 1)
        found["history"] = [
            [_said(text, f"pair {number} of its history") for text in pair] for number, pair in enumerate(history, 1)
        ]
    return found


def _of_turns(turns: list[Any], beside: Any, answered: bool) -> Item:
    """beside: a system text that stands beside the turns."""
    _refuse_many(len(turns))
    system = _said(beside, "field 'system'") if beside else ""
    said: list[str] = []
    for number, turn in enumerate(turns, start=1):
        where = f"turn {number}"
        if not isinstance(turn, dict):
            raise InputError(
                f"{where} is a {type(turn).__name__} where an object with role and content is needed; mend it"
            )
        role = _role(turn, where)
        _refuse_more(turn, where)
        if role == "assistant" and any(turn.get(name) in (0, False) for name in _LEARNED):
            raise InputError(f"{where} is an answer that is not to be learned, and every one is; leave the item out")
        text = _said(turn["value"] if turn.get("value") is not None else turn.get("content"), where)
        if role == "system":
            if said or system:
                raise InputError(f"{where} is a second system text, or not the first turn; let one stand first")
            system = text
            continue
        wanted = "assistant" if len(said) % 2 else "user"
        if role != wanted:
            what = "it begins with an answer" if not said else f"{where} is the {role}'s, as the one before it"
            raise InputError(f"{what}; user and assistant take turns, the user first: mend or remove the item")
        said.append(text)
    if len(said) % 2:
        if answered and len(said) == 1:
            raise InputError("a conversation without an answer; add the assistant's turn, or remove the item")
        if answered:
            raise InputError("its last question has no answer; take that turn out, or answer it")
        said.append("")
    if not said:
        raise InputError("a conversation without a question; mend or remove the item")
    pairs = [list(pair) for pair in zip(said[::2], said[1::2], strict=True)]
    more = {"system": system, "history": pairs[:-1]}
    (question, answer), kept = pairs[-1], {name: value for name, value in more.items() if value}
    return Item(instruction=question, input="", output=answer, **kept)


def _role(turn: Mapping[str, Any], where: str) -> str:
    given = turn.get("from") or turn.get("role")
    name = given.lower() if isinstance(given, str) else ""
    if name in _TOOLS:
        raise InputError(f"{where} is a tool's ({name!r}), and tool calls are not taught here; leave the item out")
    if name not in ROLES:
        what = "has no role" if given is None else f"has the role {given!r:.40}"
        known = "system, user and assistant are known (ShareGPT's human and gpt too)"
        raise InputError(f"{where} {what}; {known}: mend or remove the item")
    return ROLES[name]


def _said(value: Any, where: str) -> str:
    """A text that is not empty. Of OpenAI's parts, their texts."""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        if other := [part.get("type") for part in value if part.get("type") != "text"]:
            raise InputError(
                f"{where} has a part that is no text ({other[0]!r:.40}); text alone is taught: leave it out"
            )
        texts = [text for part in value if isinstance(text := part.get("text"), str)]
        value = "".join(texts) if len(texts) == len(value) else None
    if not isinstance(value, str):
        what = "nothing" if value is None else f"a {type(value).__name__}"
        raise InputError(f"{where} has {what} where text is needed; mend or remove the item")
    if not value.strip():
        raise InputError(f"{where} is empty; mend or remove the item")
    return value


def _refuse_more(value: Mapping[str, Any], where: str) -> None:
    for name, what in _BESIDE.items():
        if str(value.get(name) or "") not in ("", "[]", "{}"):
            raise InputError(f"{where} has {name!r}: {what} cannot be taught here; take it out, or leave the item out")


def _refuse_many(turns: int) -> None:
    if turns > MOST_TURNS:
        raise InputError(f"a conversation of {turns:,} turns; {MOST_TURNS:,} are read at most: cut it")
