"""Labels move to the place that predicts them, and never across a document's border."""

import numpy as np
import torch

from zhllama.artifacts.open import open_artifact
from zhllama.data.packed import TRAIN, VALIDATION, PackedDataset
from zhllama.training.model import collate


def test_each_label_is_the_token_that_follows(packed_text):
    blocks = PackedDataset(open_artifact(packed_text))
    batch = collate([blocks[index] for index in range(8)])
    at = batch["labels"] != -100
    following = torch.roll(batch["input_ids"], -1, dims=1)
    assert torch.equal(batch["labels"][at], following[at])
    assert at.any()


def test_nothing_is_predicted_from_the_document_before(packed_text):
    blocks = PackedDataset(open_artifact(packed_text))
    batch = collate([blocks[index] for index in range(8)])
    next_begins = torch.roll(batch["position_ids"], -1, dims=1) == 0
    assert (batch["labels"][next_begins] == -100).all()
    assert (batch["labels"][:, -1] == -100).all()


def test_only_answers_are_learnt(packed_instructions, llama_tokenizer):
    from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder

    encoder = SentencePieceEncoder(llama_tokenizer)
    answers = {(*encoder.encode(text), encoder.eos) for text in ("Yes", "No")}
    blocks, held_out = (PackedDataset(open_artifact(packed_instructions), split) for split in (TRAIN, VALIDATION))
    batch = collate([blocks[0], held_out[0]])
    for labels in batch["labels"]:
        learnt = labels[labels != -100].tolist()
        while learnt:
            end = learnt.index(encoder.eos) + 1
            assert tuple(learnt[:end]) in answers
            learnt = learnt[end:]


def test_faithful_batches_are_cut_to_their_longest_sample_and_keep_nothing_apart():
    def block(prompt: int, end: int) -> dict[str, np.ndarray]:
        ids = np.arange(100, 116)
        labels = np.where((np.arange(16) >= prompt) & (np.arange(16) < end), ids, -100)
        positions = np.concatenate([np.arange(end), np.arange(16 - end)])
        return {"input_ids": ids, "labels": labels, "position_ids": positions}

    batch = collate([block(2, 6), block(4, 11)], faithful=True)
    assert {tuple(tensor.shape) for tensor in batch.values()} == {(2, 11)}
    assert batch["position_ids"].tolist() == [list(range(11))] * 2
    assert batch["labels"][0].tolist() == [-100, 102, 103, 104, 105] + [-100] * 6
    assert batch["labels"][1].tolist() == [-100] * 3 + list(range(104, 111)) + [-100]
