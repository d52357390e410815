"""Conversations, and items in a base's own words, as ids: turn for turn what a server asks the model for.

The ids before an answer are those of the conversation up to there with the template's beginning of an answer, then come
the answer's and what ends it, learned. Where the next turn begins with just these ids, as with every template that
writes an answer down as it was given, the conversation is one document with several answers. Where it does not (Qwen
3's leaves out what was thought; LLaMA 3's strips white space), the next turn begins a document of its own, with all
that stands before it, masked: more tokens, and the right ones. Cut on the right at the block size, as items are.
"""

import json
from collections.abc import Sequence

import numpy as np

from zhllama.data.conversations import Item, is_conversation, messages_of, texts_of
from zhllama.data.segments import BEGINS, LEARNED, MASKED, Segments
from zhllama.errors import InputError
from zhllama.tokenizer.chat import Chat, Message
from zhllama.tokenizer.prompt import RECIPE, question_of


def conversation(item: Item) -> list[Message]:
    """All of an item, its answer too."""
    return [*messages_of(item), {"role": "assistant", "content": item["output"]}]


def identity(item: Item) -> bytes:
    """What decides an item's side of the split: what its answer answers; of whichever prompt, the same."""
    if is_conversation(item):
        return json.dumps(messages_of(item), ensure_ascii=False).encode()
    return RECIPE.wrap(question_of(item)).encode()


def documents_of(chat: Chat, messages: Sequence[Message], block_size: int) -> list[tuple[list[int], list[int]]]:
    """(ids, marks) of each document of a conversation; all prompt where the first question fills a block."""
    found: list[tuple[list[int], list[int]]] = []
    for before, said in chat.turns(messages):
        ids, marks = found[-1] if found else ([], [])
        if before[: len(ids)] != ids:
            ids, marks = [], []
        if len(before) >= block_size:
            return found or [(before[:block_size], [MASKED] * block_size)]
        if ids:
            found.pop()
        said = said[: block_size - len(before)]
        marks = marks + [MASKED] * (len(before) - len(marks)) + [LEARNED] * len(said)
        found.append((before + said, marks))
    return found


def encoded(
    chat: Chat, items: Sequence[Item], block_size: int, id_type: np.dtype
) -> tuple[Segments, list[Item], list[InputError]]:
    """A segment an item, its documents one after another; of which items; and what was wrong with the others, which the
    template refuses."""
    ids: list[int] = []
    marks: list[int] = []
    lengths, prompts, kept, faults = [], [], [], []
    for item in items:
        try:
            documents = documents_of(chat, conversation(item), block_size)
        except InputError as fault:
            mend = "mend or remove the item, or give prepare_dataset --template alpaca"
            faults.append(InputError(f"{item.place}: {fault}; {mend}"))
            continue
        begin = len(ids)
        for number, (of_document, marked) in enumerate(documents):
            marks += [BEGINS, *marked[1:]] if number else marked
            ids += of_document
        kept.append(item)
        lengths.append(len(ids) - begin)
        of_item = marks[begin:]
        prompts.append(of_item.index(LEARNED) if LEARNED in of_item else len(of_item))
    places = (np.array(of, np.int64) for of in (lengths, prompts))
    return Segments(np.array(ids, id_type), next(places), next(places), np.array(marks, np.uint8)), kept, faults


def characters_of(item: Item) -> int:
    return sum(map(len, texts_of(item)))
