"""Documents and items become the ids that the recipe's rule gives, whatever they hold and however they are batched."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.prepare_dataset import examples
from components.prepare_dataset.examples import instruction_examples, text_examples
from components.shared.corpus import Document
from components.shared.packed import IGNORED
from components.shared.prompt import wrap
from components.shared.vocabulary import Encoder

texts = st.text(
    st.sampled_from("的是不了在 \n\tabc</s>[PAD]<s>1，。🤗") | st.characters(codec="utf-8"), min_size=1, max_size=40
)
items = st.fixed_dictionaries({"instruction": texts, "input": st.just("") | texts, "output": texts})


@pytest.fixture(scope="module")
def encoder(llama_tokenizer) -> Encoder:
    return Encoder(llama_tokenizer)


def recipes_sample(item: dict[str, str], encoder: Encoder, block_size: int) -> tuple[list[int], list[int]]:
    """The recipe, in its own words: prompt with BOS, answer and EOS apart, -100 over the prompt, cut on the right."""
    prompt = [encoder.bos, *encoder.encode(wrap(item["instruction"], item["input"]))]
    answer = [*encoder.encode(item["output"]), encoder.eos]
    labels = [IGNORED] * len(prompt) + answer
    return (prompt + answer)[:block_size], labels[:block_size]


@settings(max_examples=60, deadline=None)
@given(given_items=st.lists(items, min_size=1, max_size=6), block_size=st.integers(60, 400), batch=st.integers(1, 4))
def test_items_are_the_recipes_samples(encoder, given_items, block_size, batch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examples, "BATCH", batch)
        made = list(instruction_examples(given_items, encoder, block_size))
    assert len(made) == len(given_items)
    for item, example in zip(given_items, made, strict=True):
        ids, labels = recipes_sample(item, encoder, block_size)
        assert example.segment.ids.tolist() == ids
        learned = [IGNORED] * example.segment.prompt + ids[example.segment.prompt :]
        assert learned == labels
        assert example.learned is any(label != IGNORED for label in labels)
        assert [json.loads(record) for record in example.records()] == [item]


@settings(max_examples=60, deadline=None)
@given(given_texts=st.lists(texts, min_size=1, max_size=12), batch=st.integers(1, 5), end=st.booleans())
def test_documents_are_bos_ids_and_eos(encoder, given_texts, batch, end):
    documents = [Document(text, "a.txt", number) for number, text in enumerate(given_texts, start=1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examples, "BATCH", batch)
        made = list(text_examples(documents, encoder, end=end))
    closing = [encoder.eos] if end else []
    assert [example.segment.ids.tolist() for example in made] == [
        [encoder.bos, *encoder.encode(text), *closing] for text in given_texts
    ]
    assert [json.loads(example.records()[0])["text"] for example in made] == given_texts


def test_long_documents_make_smaller_batches(encoder, monkeypatch):
    seen = []
    whole = encoder.encode_arrays
    monkeypatch.setattr(
        encoder, "encode_arrays", lambda texts, **options: seen.append(len(texts)) or whole(texts, **options)
    )
    monkeypatch.setattr(examples, "BATCH_CHARACTERS", 100)
    documents = [Document("word " * 10, "a.txt", number) for number in range(10)]
    assert len(list(text_examples(documents, encoder))) == 10
    assert seen == [2] * 5


def test_a_fault_while_encoding_is_not_lost(encoder, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("broken")

    monkeypatch.setattr(encoder, "encode_arrays", fail)
    with pytest.raises(RuntimeError, match="broken"):
        list(text_examples([Document("a", "a.txt", 1)], encoder))
