"""Log-losses of answers to instructions and exams, as report.json has them; of text: zhllama/inference/scoring.py.

The model's own prompt, then the answer's ids as training has them and what ends it (nothing behind an exam's letter:
text goes on there). The greatest summed log-likelihood wins; all choices are scored in one row behind one prompt, each
seeing the prompt and itself: half the work of a row a choice, for two.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from components.evaluate.exams import Exam, letters, prompts
from components.evaluate.held_out import HeldOutItem, chance
from zhllama.data.conversations import messages_of
from zhllama.errors import InputError
from zhllama.inference.load import LoadedModel
from zhllama.inference.scoring import batches, log_probs_of, padded
from zhllama.progress import Progress


def score_items(loaded: LoadedModel, items: Sequence[HeldOutItem], title: str) -> dict[str, Any]:
    """The figures of held-out instructions."""
    fitting, rows, costs = [], [], []
    for item in items:
        try:
            prompt, answers = loaded.chat.answered(messages_of(item.item), item.choices)
        except InputError as fault:
            raise InputError(f"{item.item.place}: {fault}; evaluate without this item") from fault
        if len(prompt) + max(map(len, answers)) <= loaded.positions:
            fitting.append(item)
            rows.append(_row(prompt, answers))
            costs.append(torch.tensor(loaded.encoder.unknown_bytes(item.choices)) * 8 * math.log(2))
    right, exact = [False] * len(rows), 0
    losses = torch.zeros(len(rows), dtype=torch.float64)
    for index, sums, hits in _scored_rows(loaded, rows, title, "items"):
        answer = fitting[index].answer
        sums = sums - costs[index]
        right[index] = int(sums.argmax()) == answer
        exact += bool(hits[answer]) and not costs[index][answer]
        losses[index] = -sums[answer]
    chosen = [(item, hit) for item, hit in zip(fitting, right) if len(item.choices) > 1]
    groups: dict[str, list[tuple[HeldOutItem, bool]]] = defaultdict(list)
    for item, hit in chosen:
        groups[item.item["instruction"]].append((item, hit))
    size = sum(len(item.choices[item.answer].encode()) for item in fitting)
    bits = losses.sum().item() / math.log(2) / size if size else math.nan
    return {
        **_shares(sum(hit for _, hit in chosen), len(chosen)),
        "chance": chance(item for item, _ in chosen) if chosen else None,
        "exact_match": exact / len(rows) if rows else None,
        "exact_match_items": len(rows),
        "answer_bits_per_byte": bits if math.isfinite(bits) else None,
        "too_long": len(items) - len(rows),
        "groups": [
            {
                "instruction": instruction,
                "choices": list(group[0][0].choices),
                "items": len(group),
                "accuracy": sum(hit for _, hit in group) / len(group),
                "chance": chance(item for item, _ in group),
            }
            for instruction, group in sorted(groups.items(), key=lambda pair: (-len(pair[1]), pair[0]))
        ],
    }


def score_exam(loaded: LoadedModel, exam: Exam, shots: int, title: str) -> dict[str, Any]:
    """The figures of an exam, each question with up to `shots` worked examples before it. The accuracy is over
    questions, not the mean of the subjects'."""
    questions = [(number, question) for number, subject in enumerate(exam.subjects) for question in subject.questions]
    rows, owners = [], []
    for number, question in questions:
        asked = prompts(exam.subjects[number], question, shots)
        if row := next(_fitting_rows(loaded, asked, letters(question)), None):
            rows.append(row)
            owners.append((number, question.answer))
    right, items = [0] * len(exam.subjects), [0] * len(exam.subjects)
    for index, sums, _ in _scored_rows(loaded, rows, title, "questions"):
        number, answer = owners[index]
        items[number] += 1
        right[number] += int(sums.argmax()) == answer
    return {
        "exam": exam.name,
        "shots": shots,
        **_shares(sum(right), len(rows)),
        "chance": sum(1 / len(question.choices) for _, question in questions) / len(questions) if questions else None,
        "too_long": len(questions) - len(rows),
        "subjects": [
            {"subject": subject.name, "items": count, "accuracy": hits / count if count else None}
            for subject, hits, count in zip(exam.subjects, right, items)
        ],
    }


def _shares(right: int, count: int) -> dict[str, Any]:
    """How many were right. margin: half the 95% interval, by the normal approximation."""
    share = right / count if count else None
    margin = None if share is None else 1.96 * math.sqrt(share * (1 - share) / count)
    return {"items": count, "accuracy": share, "margin": margin}


class _Row(NamedTuple):
    """A prompt with answers behind it. ids, places: (length,), the tokens and their positions; segments: (length,), 0
    for the prompt, 1.. for the answers. at: positions whose next token is scored; targets: that; owner: its answer."""

    ids: list[int]
    places: list[int]
    segments: list[int]
    at: list[int]
    targets: list[int]
    owner: list[int]


def _row(prompt: list[int], answers: Sequence[list[int]]) -> _Row:
    """prompt: ids with BOS. answers: ids with EOS; the last id of an answer is scored but never fed."""
    row = _Row(list(prompt), list(range(len(prompt))), [0] * len(prompt), [], [], [])
    for number, answer in enumerate(answers):
        begin = len(row.ids)
        row.ids.extend(answer[:-1])
        row.places.extend(range(len(prompt), len(prompt) + len(answer) - 1))
        row.segments.extend([number + 1] * (len(answer) - 1))
        row.at.extend([len(prompt) - 1, *range(begin, begin + len(answer) - 1)])
        row.targets.extend(answer)
        row.owner.extend([number] * len(answer))
    return row


def _fitting_rows(loaded: LoadedModel, texts: Sequence[str], answers: Sequence[str]) -> Iterator[_Row]:
    """The rows of those prompts that fit the model's positions with the longest answer behind them."""
    for text in texts:
        # a letter is encoded where it stands: alone it would get a space in front
        whole = [loaded.prompt_ids(text + answer) for answer in answers]
        common = loaded.prompt_ids(text)
        while any(ids[: len(common)] != common for ids in whole):
            common.pop()
        if max(map(len, whole)) <= loaded.positions:
            yield _row(common, [ids[len(common) :] for ids in whole])


def _scored_rows(
    loaded: LoadedModel, rows: Sequence[_Row], title: str, unit: str
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(index of the row, log-likelihood of each of its answers, whether greedy decoding gives it), in any order."""
    with torch.inference_mode(), Progress(title, len(rows), unit) as bar:
        for batch in batches([row.ids for row in rows]):
            for index, (log_probs, hit) in zip(batch, _score_rows(loaded, [rows[index] for index in batch])):
                owner = torch.tensor(rows[index].owner)
                count = int(owner.max()) + 1
                sums = torch.zeros(count, dtype=torch.float64).index_add_(0, owner, log_probs)
                yield index, sums, torch.bincount(owner[~hit], minlength=count) == 0
            bar.advance(len(batch))


def _score_rows(loaded: LoadedModel, rows: Sequence[_Row]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each row (log-probabilities, whether the target was the likeliest token), along its `targets`."""
    device, kind = loaded.device, loaded.model.dtype
    ids = padded([row.ids for row in rows], loaded.padding)
    places = padded([row.places for row in rows], 0)
    # padding is a segment of its own per row; it sees the prompt, and nobody sees it
    segments = padded([row.segments for row in rows], -1)
    # (batch, query, key): a token sees what is before it, of the prompt and of its own answer
    seen = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
    seen &= torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape, dtype=kind).masked_fill_(~seen, torch.finfo(kind).min)[:, None]
    # base_model is the stack without the output layer
    hidden = loaded.model.base_model(
        ids.to(device), position_ids=places.to(device), attention_mask=mask.to(device), use_cache=False
    ).last_hidden_state
    at = torch.tensor([(number, place) for number, row in enumerate(rows) for place in row.at], device=device)
    targets = torch.tensor([target for row in rows for target in row.targets])
    found = log_probs_of(loaded, hidden[at[:, 0], at[:, 1]], targets)
    counts = [len(row.targets) for row in rows]
    return zip(found.log_probs.split(counts), found.likeliest.split(counts))
