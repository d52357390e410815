"""Documents and items become the ids that the recipe's rule gives, whatever they hold and however they are batched."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.prepare_dataset import examples
from components.prepare_dataset.examples import Examples, instruction_examples, text_examples
from zhllama.data.conversations import Item
from zhllama.data.corpus import Documents
from zhllama.data.packed import IGNORED
from zhllama.tokenizer.prompt import DEFAULT, PROMPTS, RECIPE, Prompt, question_of
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder
from zhllama.tokenizer.vocabulary import Encoder

texts = st.text(
    st.sampled_from("的是不了在 \n\tabc</s>[PAD]<s>1，。🤗") | st.characters(codec="utf-8"), min_size=1, max_size=40
)
items = st.fixed_dictionaries({"instruction": texts, "input": st.just("") | texts, "output": texts})


@pytest.fixture(scope="module")
def encoder(llama_tokenizer) -> Encoder:
    return SentencePieceEncoder(llama_tokenizer)


def sample(item: dict[str, str], encoder: Encoder, block_size: int, prompted: Prompt) -> tuple[list[int], list[int]]:
    """The recipe, in its own words: prompt with BOS, answer and EOS apart, -100 over the prompt, cut on the right; of
    what is taught by default, prompt and answer as one text."""
    text = prompted.wrap(question_of(item))
    prompt = [encoder.bos, *encoder.encode(text)]
    answer = [*encoder.encode(item["output"]), encoder.eos]
    if prompted is DEFAULT:
        whole = [encoder.bos, *encoder.encode(text + item["output"]), encoder.eos]
        assert whole[: len(prompt)] == prompt
        answer = whole[len(prompt) :]
    labels = [IGNORED] * len(prompt) + answer
    return (prompt + answer)[:block_size], labels[:block_size]


def one_by_one(batches: list[Examples]) -> list[Examples]:
    """Each example apart."""
    return [batch.part(at, at + 1) for batch in batches for at in range(len(batch))]


def batched(texts: list[str], size: int) -> list[Documents]:
    return [Documents(texts[at : at + size], "a.txt") for at in range(0, len(texts), size)]


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@settings(max_examples=60, deadline=None)
@given(given_items=st.lists(items, min_size=1, max_size=6), block_size=st.integers(60, 400), batch=st.integers(1, 4))
def test_items_are_the_recipes_samples_or_one_text(encoder, prompt, given_items, block_size, batch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examples, "BATCH", batch)
        made = one_by_one(list(instruction_examples(given_items, encoder, block_size, prompt)))
    assert len(made) == len(given_items)
    for item, example in zip(given_items, made, strict=True):
        ids, labels = sample(item, encoder, block_size, prompt)
        found, asked = example.segments.ids.tolist(), int(example.segments.prompts[0])
        assert found == ids
        assert [IGNORED] * asked + ids[asked:] == labels
        assert example.has_loss.tolist() == [any(label != IGNORED for label in labels)]
        assert [json.loads(record) for record in example.records(encoder)] == [item]
        assert example.identities == [RECIPE.wrap(question_of(item)).encode()]


CONVERSATION = Item(instruction="x", input="", output="y", history=[["a", "b"]])


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@settings(max_examples=40, deadline=None)
@given(given_items=st.lists(items, min_size=1, max_size=4), block_size=st.integers(60, 400))
def test_an_item_has_the_same_ids_beside_a_conversation(encoder, prompt, given_items, block_size):
    alone = one_by_one(list(instruction_examples([*map(Item, given_items)], encoder, block_size, prompt)))
    beside = [*map(Item, given_items), CONVERSATION]
    *found, _ = one_by_one(list(instruction_examples(beside, encoder, block_size, prompt)))
    for one, other in zip(alone, found, strict=True):
        assert one.segments.ids.tolist() == other.segments.ids.tolist()
        assert one.segments.marked.tolist() == other.segments.marked.tolist()
        assert one.segments.prompts.tolist() == other.segments.prompts.tolist()
        assert (one.identities, one.contents) == (other.identities, other.contents)


@settings(max_examples=60, deadline=None)
@given(given_texts=st.lists(texts, min_size=1, max_size=12), batch=st.integers(1, 5), end=st.booleans())
def test_documents_are_bos_ids_and_eos(encoder, given_texts, batch, end):
    made = one_by_one(list(text_examples(batched(given_texts, batch), encoder, end=end)))
    closing = [encoder.eos] if end else []
    assert [example.segments.ids.tolist() for example in made] == [
        [encoder.bos, *encoder.encode(text), *closing] for text in given_texts
    ]
    assert [json.loads(record)["text"] for example in made for record in example.records(encoder)] == given_texts
    assert [example.identities for example in made] == [[text.encode()] for text in given_texts]
    assert [example.characters for example in made] == [[len(text)] for text in given_texts]


@settings(max_examples=60, deadline=None)
@given(given_texts=st.lists(texts, min_size=1, max_size=9), data=st.data())
def test_parts_joined_are_the_whole_and_some_are_those_chosen(encoder, given_texts, data):
    (whole,) = text_examples(batched(given_texts, 9), encoder)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=4)))
    edges = zip([0, *cuts], [*cuts, len(whole)], strict=True)
    again = Examples.joined([whole.part(begin, end) for begin, end in edges])
    kept = np.array(data.draw(st.lists(st.booleans(), min_size=len(whole), max_size=len(whole))))
    for one, chosen in ((again, np.ones(len(whole), bool)), (whole.where(kept), kept)):
        wanted = [text for text, keep in zip(given_texts, chosen, strict=True) if keep]
        assert one.contents == wanted
        assert one.segments.ids.tolist() == [
            token for text in wanted for token in (encoder.bos, *encoder.encode(text), encoder.eos)
        ]
        assert one.identities == [text.encode() for text in wanted]
        assert one.characters == [len(text) for text in wanted]
        assert len(one.segments) == len(one) == len(wanted)


def test_long_items_make_smaller_batches(encoder, monkeypatch):
    monkeypatch.setattr(examples, "BATCH_CHARACTERS", 100)
    item = {"instruction": "word " * 10, "input": "", "output": "yes"}
    assert [len(batch) for batch in instruction_examples([item] * 10, encoder, 512, DEFAULT)] == [2] * 5


def test_a_fault_while_encoding_is_not_lost(encoder, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("broken")

    monkeypatch.setattr(encoder, "encode_flat", fail)
    with pytest.raises(RuntimeError, match="broken"):
        list(text_examples(batched(["a"], 1), encoder))
