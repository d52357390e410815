"""What belongs together: one answer for every stage."""

from pathlib import Path

import pytest

from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.reader import Artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.tokenizer.vocabulary import Vocabulary
from zhllama.weights.fit import (
    Step,
    require_equal,
    require_fit,
    require_rows,
    require_trained_on,
    rows_fit,
    weights_of,
)

SMALL = Vocabulary(1, "small", 1, 2, None)
LARGE = Vocabulary(2, "large", 1, 2, None, prefixes={"1": "small"})
OTHER = Vocabulary(2, "other", 1, 2, None)


def artifact(digest, **facts):
    return Artifact(Manifest(kind="hf-model", stage="", root=f"/{digest}", files=(), digest=digest, facts=facts), True)


def step(name, vocabulary=None, brings_rows=False, trained_on=None):
    return Step(name, name * 12, vocabulary, vocabulary.size if brings_rows else None, trained_on)


@pytest.mark.parametrize(
    ("pieces", "rows", "multiple", "fit"),
    [
        (49_953, 49_953, None, True),
        (49_953, 49_960, None, True),
        (49_954, 50_008, None, True),
        (151_669, 151_936, None, True),
        (49_953, 49_955, None, False),
        (49_953, 32_000, None, False),
        (49_954, 49_984, 64, True),
        (49_954, 49_954, 64, True),
        (49_954, 49_960, 64, False),
    ],
)
def test_rows_belong_to_pieces_as_the_contract_says_or_padded_to_a_multiple_of_eight(pieces, rows, multiple, fit):
    contract = multiple and Vocabulary(pieces, "d", 1, 2, None, padding_multiple=multiple)
    assert rows_fit(pieces, rows, contract or None) is fit


def test_rows_that_do_not_fit_are_said_with_their_pieces():
    require_rows(10, 17, "--model m", "the model")
    require_rows(10, 16, "--model m", "the model", rows_fit(10, 16, None))
    with pytest.raises(InputError, match=r"^--model m: its tokenizer has 10 pieces and the model 9 rows; give"):
        require_rows(10, 9, "--model m", "the model")
    with pytest.raises(InputError, match=r"has 10 pieces and the model 17 rows"):
        require_rows(10, 17, "--model m", "the model", rows_fit(10, 17, None))


def test_a_dataset_needs_the_same_vocabulary_and_what_stands_against_it_is_said():
    require_equal(SMALL, SMALL, "--dataset d", "--model m")
    with pytest.raises(InputError, match=r"--dataset d has 2 pieces .* --model m has 1 pieces .* first extends the"):
        require_equal(LARGE, SMALL, "--dataset d", "--model m")
    with pytest.raises(InputError, match=r"--model m: carries no vocabulary contract"):
        require_equal(SMALL, None, "--dataset d", "--model m")


@pytest.mark.parametrize(
    ("facts", "fits"),
    [
        ({}, True),
        ({"base_digest": "another"}, False),
        ({"base_digest": "merged"}, True),
        ({"base_digest": "merged", "base_lineage": ["base", "first"]}, True),
        ({"base_digest": "merged", "base_lineage": ["base"]}, False),
    ],
    ids=["it names nothing", "another model", "its digest alone", "the same lineage", "before something was merged"],
)
def test_an_adapter_is_trained_further_on_the_model_that_it_names(facts, fits):
    model = artifact("merged", lineage=["base", "first"])
    if fits:
        require_trained_on(artifact("adapter", **facts), model, "--adapter a")
        return
    with pytest.raises(InputError, match=r"^--adapter a: it was trained on the model .* not on the model base with"):
        require_trained_on(artifact("adapter", **facts), model, "--adapter a")


def test_the_lineage_of_a_merged_model_is_its_own_and_the_adapters():
    model = artifact("base", lineage=["root", "one"])
    steps = [step("b", trained_on=("base",)), step("c", trained_on=("root", "one", "b" * 12))]
    assert require_fit(model, None, 1, steps) == ["root", "one", "b" * 12, "c" * 12]


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([step("a", OTHER)], "foreign to the 1 pieces"),
        ([step("a", LARGE)], "bring no embedding rows"),
        ([step("a", LARGE, True), step("b", SMALL)], "the first shrinks the second"),
        ([step("a", trained_on=("else",))], "was trained on the model else, and here it would be merged into"),
    ],
    ids=["foreign", "without rows", "shrinks", "another model"],
)
def test_adapters_that_fit_in_no_order_are_refused_with_the_first_reason(steps, said):
    with pytest.raises(InputError, match=f"^--adapters: a?.*{said}"):
        require_fit(artifact("base"), SMALL, 1, steps)


def test_adapters_in_the_wrong_order_are_told_the_right_one():
    first, second = step("a", trained_on=("base",)), step("b", trained_on=("base", "a" * 12))
    with pytest.raises(InputError, match=r"the order is wrong \(b was trained on .*\); give --adapters a,b$"):
        require_fit(artifact("base"), SMALL, 1, [second, first])


def test_an_adapter_of_one_merge_fits_another_merge_of_the_same_weights(tmp_path):
    """What was measured while it was merged differs from one time to the next."""
    merges = []
    for name, difference in (("one", 0.1), ("other", 0.1000001)):
        out = ArtifactWriter(str(tmp_path / name), "extend_tokenizer", "0" * 32)
        out.add_bytes("model.safetensors", b"weights")
        out.add_json("report.json", {"difference": difference}, beside=True)
        out.metrics["difference"] = difference
        merges.append(open_artifact(out.publish("hf-model").reference))
    require_trained_on(artifact("adapter", base_digest=merges[0].digest), merges[1], "--adapter a")


# --- the same bytes by another route ----------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    """`model("name", lineage=[…])`: an artifact of two shards, with a configuration of its own and these facts."""

    def publish(name, weights=(b"one", b"other"), names=("model-1.safetensors", "model-2.safetensors"), **facts):
        out = ArtifactWriter(str(tmp_path / name), "convert_weights", "0" * 32, {"route": name})
        for file, content in zip(names, weights, strict=True):
            out.add_bytes(file, content)
        out.facts = facts
        return open_artifact(out.publish("hf-model").reference)

    return publish


@pytest.fixture
def converted(model):
    return model("converted")


@pytest.fixture
def adapter(converted):
    return artifact("adapter", base_digest=converted.digest, base_weights=weights_of(converted))


def as_folder(one: Artifact) -> Artifact:
    """Without its manifest: a folder that somebody copied the weights to."""
    Path(one.root, "manifest.json").unlink()
    return open_artifact(one.root)


@pytest.mark.parametrize("plain", [False, True], ids=["an artifact", "a plain folder"])
@pytest.mark.parametrize(
    "options",
    [{}, {"names": ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]}, {"lineage": ["a", "b"]}],
    ids=["another configuration", "shards of other names", "merged from others"],
)
def test_an_adapter_fits_the_same_weights_that_came_by_another_route(options, plain, model, adapter, converted):
    fetched = model("fetched", **options)
    fetched = as_folder(fetched) if plain else fetched
    assert fetched.digest != converted.digest
    require_trained_on(adapter, fetched, "--adapter a")
    step = Step("a", "a" * 64, None, None, (converted.digest,), (), weights_of(converted))
    assert require_fit(fetched, None, 8, [step])[-1] == "a" * 64


@pytest.mark.parametrize("plain", [False, True], ids=["an artifact", "a plain folder"])
def test_an_adapter_does_not_fit_weights_that_differ_in_a_byte(plain, model, adapter, converted, caplog):
    fetched = model("fetched", weights=(b"one", b"othes"))
    fetched = as_folder(fetched) if plain else fetched
    if plain:
        # the same tensors may lie in it in other bytes
        require_trained_on(adapter, fetched, "--adapter a")
        assert f"--adapter a: it was trained on the model {converted.digest[:12]}" in caplog.text
    else:
        with pytest.raises(InputError, match=r"^--adapter a: it was trained on the model"):
            require_trained_on(adapter, fetched, "--adapter a")
    step = Step("a", "a" * 64, None, None, (converted.digest,), (), weights_of(converted))
    if plain:
        assert require_fit(fetched, None, 8, [step])[-1] == "a" * 64
        return
    with pytest.raises(InputError, match=r"a was trained on the model"):
        require_fit(fetched, None, 8, [step])


def test_a_plain_folder_is_for_all_adapters_what_the_first_takes_it_for(model):
    folder = as_folder(model("fetched"))
    first, second = step("a", trained_on=("base",)), step("b", trained_on=("base", "a" * 12))
    require_fit(folder, None, 8, [first, second])
    with pytest.raises(InputError, match=r"the order is wrong \(a was trained on .*\); give --adapters a,b$"):
        require_fit(folder, None, 8, [second, first])
    with pytest.raises(InputError, match=r"c was trained on the model other, and here it would be merged into"):
        require_fit(folder, None, 8, [first, step("c", trained_on=("other",))])
    # nor does anybody know the digest that a plain adapter had
    plain = step("p")._replace(verified=False)
    require_fit(folder, None, 8, [first, plain, step("c", trained_on=("base", "a" * 12, "as it was"))])


def test_what_was_trained_on_a_merge_into_one_of_them_fits_after_the_same_merge_into_the_other(model, converted):
    fetched = model("fetched")
    first = Step("a", "a" * 64, None, None, (converted.digest,), (), weights_of(converted))
    second = Step("b", "b" * 64, None, None, (converted.digest, "a" * 64), (), "weights of that merge")
    assert require_fit(fetched, None, 8, [first, second]) == [fetched.digest, "a" * 64, "b" * 64]
    with pytest.raises(InputError, match=r"the order is wrong .* give --adapters a,b$"):
        require_fit(fetched, None, 8, [second, first])


def test_an_adapter_that_names_no_weights_is_compared_by_its_lineage_alone(model, converted):
    old = artifact("adapter", base_digest=converted.digest)
    require_trained_on(old, converted, "--adapter a")
    with pytest.raises(InputError, match="it was trained on the model"):
        require_trained_on(old, model("fetched"), "--adapter a")
