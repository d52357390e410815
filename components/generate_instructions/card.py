"""The data card: what is in the data, what was left out and why, what it cost, and how it can be made again.

The date is that of the last answer, so that the same answers make the same card.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from components.generate_instructions.harvest import RULES, UNNAMED, Harvest, share_of
from components.generate_instructions.ledger import Ledger
from components.generate_instructions.options import GenerateInstructions
from zhllama.data.conversations import FIELDS, texts_of
from zhllama.stage.options import configuration_of
from zhllama.stage.report_page import render

EDGES = (1, 2, 5, 10, 15, 20, 30, 50, 75, 100, 150, 200, 300, 500, 1000, 2000, 5000)
"""Characters: the lower ends of a histogram's bars. The last is open."""
EXAMPLES = 6
OPENINGS = 12
ENDINGS = {
    "items": "the items that were wanted are there",
    "max-cost": "--max-cost holds no further request",
    "max-tokens": "--max-tokens holds no further request",
    "fruitless": "the model gave nothing new any more",
    "all records": "every record was read",
}


def imported(config: GenerateInstructions, harvest: Harvest, records: Mapping[str, int]) -> dict[str, Any]:
    """The card, a JSON value, of items that were imported from so many records by form."""
    ended = "items" if harvest.full else "all records"
    return {**_card(config, harvest, ended, "import"), "records": records}


def generated(config: GenerateInstructions, harvest: Harvest, ended: str, ledger: Ledger) -> dict[str, Any]:
    """The card of items that a model wrote."""
    budget, billed, charged = config.budget, ledger.billed, ledger.charged
    return _card(config, harvest, ended, "model") | {
        "model": {"name": config.model, "base_url": config.base_url, "says_it_is": sorted(ledger.models)},
        "began": ledger.first,
        "date": ledger.last,
        "requests": {
            "answered": len(ledger.settled),
            "sent": ledger.attempts.total(),
            "failures": dict(sorted(ledger.failures.items())),
        },
        "understood": dict(ledger.dialect or {}),
        "cost": {
            "billed": asdict(billed),
            "at_most": asdict(charged),
            "billed_cost": round(budget.cost(billed), 6) if budget.priced else None,
            "at_most_cost": round(budget.cost(charged), 6) if budget.priced else None,
            "tokens_per_item": round(billed.total / max(1, len(harvest.items)), 1),
        },
    }


def _card(config: GenerateInstructions, harvest: Harvest, ended: str, source: str) -> dict[str, Any]:
    items, language = harvest.items, harvest.catalogue.language
    return {
        "items": len(items),
        "wanted": config.items,
        "ended": ended,
        "source": source,
        "language": str(language["name"]),
        "share_of_script": _mean([share_of(language["script"], "\n".join(texts_of(item))) for item in items]),
        "with_input": sum(1 for item in items if item["input"]),
        "fallen": dict(harvest.fallen),
        "samples_of_fallen": {rule: harvest.samples[rule] for rule in RULES if rule in harvest.samples},
        "lengths": {field: lengths([item[field] for item in items]) for field in FIELDS},
        "openings": dict(Counter(item["instruction"][:2] for item in items).most_common(OPENINGS)),
        "topics": dict(sorted(harvest.topics.items(), key=lambda named: (-named[1], named[0]))),
        "task_types": dict(sorted(harvest.task_types.items(), key=lambda named: (-named[1], named[0]))),
        # at equal distances, the first among them
        "examples": [dict(item) for item in items[:: max(1, len(items) // EXAMPLES)][:EXAMPLES]],
        "settings": configuration_of(config),
    }


def summary(content: Mapping[str, Any]) -> str:
    """One line for the log."""
    few = 0 < content["items"] < content["wanted"]
    text = f"only {content['items']:,} of {content['wanted']:,} items" if few else f"{content['items']:,} items"
    text += f", {sum(content['fallen'].values()):,} left out"
    if content["source"] == "import":
        return f"{text}, of {sum(content['records'].values()):,} records"
    cost, answered = content["cost"], content["requests"]["answered"]
    text += f", {answered:,} answers, {sum(cost['billed'].values()):,} tokens"
    return text if cost["billed_cost"] is None else f"{text}, cost {cost['billed_cost']:.4f}"


def metrics(content: Mapping[str, Any]) -> dict[str, float]:
    """The card's figures for the manifest."""
    found: dict[str, float] = {"items": content["items"], "with_input": content["with_input"]}
    found |= {f"fallen: {rule}": count for rule, count in content["fallen"].items() if count}
    if content["source"] == "import":
        return found | {"records": sum(content["records"].values())}
    cost = content["cost"]
    found |= {"answers": content["requests"]["answered"], "requests": content["requests"]["sent"]}
    found |= {"prompt_tokens": cost["billed"]["prompt"], "answer_tokens": cost["billed"]["answer"]}
    found["tokens_at_most"] = sum(cost["at_most"].values())
    return found if cost["billed_cost"] is None else found | {"cost": cost["billed_cost"]}


def lengths(texts: Sequence[str]) -> dict[str, Any]:
    """Characters of the texts that are not empty: mean, median, 95th percentile, longest, and counts by EDGES."""
    found = sorted(len(text) for text in texts if text)
    counts = Counter(max(edge for edge in EDGES if edge <= length) for length in found)
    places = {"median": len(found) // 2, "p95": len(found) * 95 // 100, "longest": len(found) - 1}
    return {
        "texts": len(found),
        "mean": _mean(found),
        **{name: found[place] if found else 0 for name, place in places.items()},
        "histogram": {str(edge): counts[edge] for edge in EDGES},
    }


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 3) if values else 0.0


def page(content: Mapping[str, Any]) -> str:
    """The card as one HTML page."""
    histograms = []
    for field, found in content["lengths"].items():
        # columns of (from, height in percent, count), the empty ends left off
        columns = bars(found["histogram"])
        if filled := [index for index, (_, _, count) in enumerate(columns) if count]:
            histograms.append({"field": field, "columns": columns[filled[0] : filled[-1] + 1], **found})
    return render(
        Path(__file__).with_name("page.html"),
        card=content,
        ending=ENDINGS[content["ended"]],
        fallen=bars({rule: count for rule, count in content["fallen"].items() if count}),
        rules=RULES,
        histograms=histograms,
        **{name: bars(content[name], but=UNNAMED) for name in ("topics", "task_types", "openings")},
        unnamed=content["topics"].get(UNNAMED, 0),
        settings={name: value for name, value in content["settings"].items() if value not in ("", 0, -1)},
    )


def bars(counts: Mapping[str, int], but: str = "") -> list[tuple[str, float, int]]:
    """(name, length in percent of the longest, count) of each."""
    shown = {name: count for name, count in counts.items() if name != but}
    longest = max(shown.values(), default=0) or 1
    return [(name, 100 * count / longest, count) for name, count in shown.items()]
