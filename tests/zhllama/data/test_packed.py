"""The packed dataset gives back every token, learns nothing across a border, and is found by arithmetic."""

import itertools
import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.packed_data import Segment, blocks_of, in_arrays
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.data import packed
from zhllama.data.packed import IGNORED, KIND, PackedDataset, PackedWriter, Segments, packed_facts, token_type
from zhllama.data.segments import BEGINS, LEARNED, MASKED
from zhllama.errors import InputError

BLOCK = 16
PAD = 2


def publish(store, blocks, vocabulary_size=1000, block_size=BLOCK, max_shard=10**9, key="key"):
    out = ArtifactWriter(str(store), "prepare_dataset", key)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "MAX_SHARD", max_shard)
        with PackedWriter(out, "train", block_size, vocabulary_size, PAD) as split:
            for block in blocks:
                split.write_blocks(blocks_of([Segment(np.array(ids), prompt) for ids, prompt in block]))
    out.facts.update(packed_facts(block_size, vocabulary_size, PAD, [split]))
    return open_artifact(out.publish(KIND).reference)


@st.composite
def packed_blocks(draw):
    """A few blocks of segments that fit, each with ids and a prompt length."""
    blocks = []
    for _ in range(draw(st.integers(1, 5))):
        left, block = BLOCK, []
        while left and (not block or draw(st.booleans())):
            ids = draw(st.lists(st.integers(3, 999), min_size=1, max_size=left))
            block.append((ids, draw(st.integers(0, len(ids)))))
            left -= len(ids)
        blocks.append(block)
    return blocks


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(blocks=packed_blocks(), per_shard=st.integers(1, 3))
def test_every_document_is_read_back_with_its_labels_and_positions(tmp_path_factory, blocks, per_shard):
    artifact = publish(tmp_path_factory.mktemp("store"), blocks, max_shard=per_shard * BLOCK * 2)
    dataset = PackedDataset(artifact)
    assert len(dataset) == len(blocks)
    for index, block in enumerate(blocks):
        item = dataset[index]
        at = 0
        for ids, prompt in block:
            end = at + len(ids)
            learned = max(prompt, 1)
            assert item["input_ids"][at:end].tolist() == ids
            assert item["position_ids"][at:end].tolist() == list(range(len(ids)))
            assert item["labels"][at:end].tolist() == [IGNORED] * learned + ids[learned:]
            at = end
        padding = BLOCK - at
        assert item["input_ids"][at:].tolist() == [PAD] * padding
        assert item["labels"][at:].tolist() == [IGNORED] * padding
        assert item["position_ids"][at:].tolist() == list(range(padding))


@settings(max_examples=50, deadline=None)
@given(blocks=packed_blocks())
def test_after_the_shift_no_token_predicts_another_document(tmp_path_factory, blocks):
    dataset = PackedDataset(publish(tmp_path_factory.mktemp("store"), blocks))
    for item in dataset:
        # position 0 begins a document: the token before it must not learn it
        assert (item["labels"][item["position_ids"] == 0] == IGNORED).all()


def test_the_dataset_is_the_same_in_a_folder_and_in_s3(store):
    blocks = [[([5, 6, 7], 1), ([8] * 13, 0)], [([9] * 4, 2)]]
    artifact = publish(store, blocks, max_shard=BLOCK * 2)
    assert sorted(name for name in artifact.names if name.endswith(".bin")) == [
        f"train-0000{shard}.{kind}" for shard in (0, 1) for kind in ("bin", "offsets.bin", "segments.bin")
    ]
    items = list(PackedDataset(artifact))
    assert [item["input_ids"].tolist() for item in items] == [[5, 6, 7] + [8] * 13, [9] * 4 + [PAD] * 12]


def test_a_block_is_read_by_range(store):
    artifact = publish(store, [[([index] * BLOCK, 0)] for index in range(3, 9)])
    raw = artifact.read_range("train-00000.bin", 4 * BLOCK * 2, BLOCK * 2)
    assert np.frombuffer(raw, "<u2").tolist() == PackedDataset(artifact).tokens(4).tolist() == [7] * BLOCK


@pytest.mark.parametrize(("size", "bytes_a_token"), [(49_954, 2), (65_536, 2), (65_537, 4), (128_256, 4)])
def test_ids_take_two_bytes_while_the_vocabulary_fits(tmp_path, size, bytes_a_token):
    artifact = publish(tmp_path, [[([size - 1] * BLOCK, 0)]], vocabulary_size=size)
    assert artifact.file("train-00000.bin").size == BLOCK * bytes_a_token
    assert np.dtype(token_type(size)).itemsize == bytes_a_token
    assert PackedDataset(artifact)[0]["input_ids"].tolist() == [size - 1] * BLOCK


def test_text_without_prompts_takes_two_bytes_a_document(tmp_path):
    out = ArtifactWriter(str(tmp_path), "prepare_dataset", "key")
    with PackedWriter(out, "train", BLOCK, 1000, PAD, prompts=False) as split:
        for _ in range(100):
            split.write_blocks(blocks_of([Segment(np.full(6, 7)), Segment(np.full(10, 8))]))
    out.facts.update(packed_facts(BLOCK, 1000, PAD, [split]))
    artifact = open_artifact(out.publish(KIND).reference)
    assert artifact.file("train-00000.segments.bin").size == 200 * 2
    assert PackedDataset(artifact).segments(99).tolist() == [[0, 1, 6], [6, 7, 16]]
    with (
        pytest.raises(ValueError, match="a prompt of 3 tokens"),
        PackedWriter(ArtifactWriter(str(tmp_path), "s", "k"), "train", BLOCK, 1000, PAD, prompts=False) as split,
    ):
        split.write_blocks(blocks_of([Segment(np.full(6, 7), 3)]))


@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    chosen=st.lists(st.integers(0, 11), max_size=20),
    cuts=st.tuples(st.integers(0, 12), st.integers(0, 12)),
)
def test_parts_of_many_segments_are_those_segments(lengths, chosen, cuts):
    single = [Segment(np.full(length, number), number % 3) for number, length in enumerate(lengths)]
    whole = in_arrays(single)
    begin, end = sorted(cuts)
    numbers = [number for number in chosen if number < len(lengths)]
    kept = np.isin(np.arange(len(lengths)), numbers)
    for some, wanted in (
        (whole, single),
        (whole.part(begin, end), single[begin:end]),
        (whole.take(np.array(numbers, int)), [single[number] for number in numbers]),
        (whole.where(kept), [segment for segment, keep in zip(single, kept, strict=True) if keep]),
        (Segments.joined([whole, whole.part(begin, end)]), single + single[begin:end]),
    ):
        assert len(some) == len(wanted)
        assert some.ids.tolist() == [token for ids, _ in wanted for token in ids.tolist()]
        assert some.lengths.tolist() == [len(ids) for ids, _ in wanted]
        assert some.prompts.tolist() == [prompt for _, prompt in wanted]


# --- several answers in one document, and several documents of one item -----------------------------------------------


@st.composite
def conversations(draw):
    """[(ids, marks)] of a few items, each of one document or more."""
    items = []
    for _ in range(draw(st.integers(1, 5))):
        marks: list[int] = []
        for number in range(draw(st.integers(1, 2))):
            document = []
            for _ in range(draw(st.integers(1, 2))):
                document += [MASKED] * draw(st.integers(1, 2)) + [LEARNED] * draw(st.integers(1, 2))
            marks += [BEGINS, *document[1:]] if number else document
        items.append((draw(st.lists(st.integers(3, 999), min_size=len(marks), max_size=len(marks))), marks))
    return items


def in_marked_arrays(items):
    marks = [of for _, of in items]
    arrays = [np.array([one for of in every for one in of]) for every in ([ids for ids, _ in items], marks)]
    lengths = np.array([len(of) for of in marks])
    return Segments(arrays[0], lengths, np.array([of.index(LEARNED) for of in marks]), arrays[1].astype(np.uint8))


@settings(max_examples=60, deadline=None)
@given(items=conversations(), single=st.lists(st.integers(3, 999), min_size=2, max_size=6), per_shard=st.integers(1, 3))
def test_every_answer_is_read_back_with_its_labels_and_positions(tmp_path_factory, items, single, per_shard):
    plain = in_arrays([Segment(np.array(single), 1)])
    # in parts, joined with what has no marks, picked: what is marked stays with its ids
    whole = in_marked_arrays(items)
    whole = Segments.joined([whole.part(0, 1), plain, whole.part(1, len(whole))])
    order = np.random.default_rng(1).permutation(len(whole))
    segments = whole.take(order).where(np.ones(len(whole), bool)).documents()
    out = ArtifactWriter(str(tmp_path_factory.mktemp("store")), "prepare_dataset", "key")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "MAX_SHARD", per_shard * BLOCK * 2)
        with PackedWriter(out, "train", BLOCK, 1000, PAD) as split:
            split.write_blocks(packed.Blocks(segments, np.ones(len(segments), int)))
    out.facts.update(packed_facts(BLOCK, 1000, PAD, [split]))
    dataset = PackedDataset(open_artifact(out.publish(KIND).reference))
    wanted = [(single, [MASKED] + [LEARNED] * (len(single) - 1))]
    wanted[:0], items = items[:1], items[1:]
    wanted = [(wanted + items)[at] for at in order]
    apart = []
    for ids, marks in wanted:
        begins = [0, *[at for at, mark in enumerate(marks) if mark == BEGINS], len(ids)]
        apart += [(ids[a:b], marks[a:b]) for a, b in itertools.pairwise(begins)]
    assert len(dataset) == len(apart)
    assert split.segments == len(apart)
    assert split.loss_tokens == sum(mark == LEARNED for _, marks in apart for mark in marks)
    for block, (ids, marks) in zip(dataset, apart, strict=True):
        assert block["input_ids"].tolist() == ids + [PAD] * (BLOCK - len(ids))
        labels = [token if mark == LEARNED else IGNORED for token, mark in zip(ids, marks, strict=True)]
        assert block["labels"].tolist() == labels + [IGNORED] * (BLOCK - len(ids))
        assert block["position_ids"].tolist() == [*range(len(ids)), *range(BLOCK - len(ids))]


MARKS = [MASKED, LEARNED, MASKED, MASKED, LEARNED, LEARNED]


def conversation(tmp_path, marks=MARKS):
    out = ArtifactWriter(str(tmp_path), "prepare_dataset", "key")
    with PackedWriter(out, "train", BLOCK, 1000, PAD) as split:
        segments = in_marked_arrays([(list(range(10, 10 + len(marks))), marks)])
        split.write_blocks(
            packed.Blocks(Segments.joined([in_arrays([Segment(np.full(4, 7), 2)]), segments]), np.array([2]))
        )
    out.facts.update(packed_facts(BLOCK, 1000, PAD, [split]))
    return out, split


def test_a_turn_that_goes_on_has_its_places_swapped_and_releases_that_know_none_refuse_it(tmp_path):
    out, split = conversation(tmp_path)
    artifact = open_artifact(out.publish(KIND).reference)
    assert np.frombuffer(artifact.read("train-00000.segments.bin"), "<u2").tolist() == [2, 4, 5, 6, 10, 8]
    # they take 1 and 2
    assert split.facts()["columns"] == 3
    assert split.facts()["turns"] == 1
    dataset = PackedDataset(artifact)
    assert dataset.segments(0).tolist() == [[0, 2, 4], [4, 5, 6], [6, 8, 10]]
    assert dataset.turns(0)[1].tolist() == [False, False, True]


@pytest.mark.parametrize("places", [[4, 2, 5, 6, 10, 8], [2, 4, 5, 6, 5, 3], [2, 4, 5, 6, 8, 17]])
def test_turns_that_do_not_follow_one_another_are_damage(tmp_path, places):
    out, _ = conversation(tmp_path)
    with out.writer("train-00000.segments.bin") as file:
        file.write(np.array(places, "<u2").tobytes())
    with pytest.raises(InputError, match="block 0 of train: its segments do not follow one another; it is damaged"):
        PackedDataset(open_artifact(out.publish(KIND).reference))[0]


def test_what_ends_behind_its_last_answer_is_a_bug(tmp_path):
    with pytest.raises(ValueError, match="ends behind its last answer"):
        conversation(tmp_path, [*MARKS, MASKED])


def test_a_dataset_of_an_older_version_is_refused(tmp_path):
    out = ArtifactWriter(str(tmp_path), "prepare_dataset", "key")
    with PackedWriter(out, "train", BLOCK, 1000, PAD) as split:
        split.write_blocks(blocks_of([Segment(np.full(6, 7))]))
    out.facts.update(packed_facts(BLOCK, 1000, PAD, [split]))
    del out.facts["splits"]["train"]["columns"]
    with pytest.raises(InputError, match="an older version of zhllama wrote it; run prepare_dataset again"):
        PackedDataset(open_artifact(out.publish(KIND).reference))


@pytest.mark.parametrize("columns", [0, 4, 2.0, True, "2"])
def test_columns_of_no_kind_that_there_is_are_damage(tmp_path, columns):
    out, _ = conversation(tmp_path)
    out.facts["splits"]["train"]["columns"] = columns
    with pytest.raises(InputError, match="its manifest's columns; it is damaged"):
        PackedDataset(open_artifact(out.publish(KIND).reference))


def test_a_block_may_be_longer_than_16_bits_count(tmp_path):
    artifact = publish(tmp_path, [[([7] * 70_000, 0), ([8] * 2_000, 0)]], block_size=72_000)
    assert PackedDataset(artifact).segments(0).tolist() == [[0, 1, 70_000], [70_000, 70_001, 72_000]]


def test_a_worker_gets_the_place_and_not_the_data(tmp_path):
    dataset = PackedDataset(publish(tmp_path, [[([index] * BLOCK, 0)] for index in range(3, 9)] * 1000))
    dataset[0]
    sent = pickle.dumps(dataset)
    assert len(sent) < 5_000
    assert pickle.loads(sent)[5]["input_ids"].tolist() == [8] * BLOCK


def test_torchs_loader_gives_batches(tmp_path):
    from torch.utils.data import DataLoader

    dataset = PackedDataset(publish(tmp_path, [[([index] * BLOCK, 0)] for index in range(3, 9)]))
    batch = next(iter(DataLoader(dataset, batch_size=4)))
    assert batch["labels"].shape == (4, BLOCK)
    assert batch["position_ids"].tolist() == [list(range(BLOCK))] * 4


def test_a_split_that_is_not_there_says_how_to_get_one(tmp_path):
    artifact = publish(tmp_path, [[([5] * 4, 0)]])
    with pytest.raises(InputError, match=r"no validation split; prepare it with --validation-fraction"):
        PackedDataset(artifact, "validation")


def test_another_artifact_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(InputError, match=r"--dataset .*not a packed dataset"):
        PackedDataset(open_artifact(str(tmp_path)))


@pytest.mark.slow
def test_memory_does_not_grow_with_what_is_written(tmp_path):
    out = ArtifactWriter(str(tmp_path), "prepare_dataset", "key")
    block = [Segment(np.full(64, 7)) for _ in range(8)]
    flush = 2**20 // (512 * 2)  # blocks that are written together
    held = []
    tracemalloc.start()
    with PackedWriter(out, "train", 512, 1000, PAD) as split:
        for count in range(1, 12 * flush + 1):
            split.write_blocks(blocks_of(block))
            if count in (4 * flush, 12 * flush):
                held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert split.segments == 8 * 12 * flush
    assert held[1] < held[0] + 20_000


def test_a_failing_store_leaves_no_shard(tmp_path, monkeypatch):
    out = ArtifactWriter(str(tmp_path), "prepare_dataset", "key")

    def fail(*_):
        raise OSError("no space left")

    split = PackedWriter(out, "train", BLOCK, 1000, PAD)
    split.write_blocks(blocks_of([Segment(np.full(2, 7))]))
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        split.__exit__(None, None, None)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("index", [-2, 1])
def test_an_index_outside_is_an_index_error(tmp_path, index):
    dataset = PackedDataset(publish(tmp_path, [[([5] * 4, 0)]]))
    with pytest.raises(IndexError):
        dataset[index]


@pytest.mark.parametrize("block", [[], [([5] * 17, 0)], [([], 0)]], ids=["no segment", "too long", "empty segment"])
def test_a_block_that_cannot_be_is_a_bug(tmp_path, block):
    with pytest.raises(ValueError, match=r"segment"):
        publish(tmp_path, [block])
