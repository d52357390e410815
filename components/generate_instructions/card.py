"""The data card: what is in the data, what was left out and why, what it cost, and how it can be made again.

card.json for programs, report.html for people. The date is that of the last answer, so that the same
answers make the same card.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from components.generate_instructions.catalogue import Catalogue
from components.generate_instructions.validate import RULES, UNNAMED, share_of
from zhllama.data.instructions import FIELDS
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
"""Why it ended."""


def card(config: Any, catalogue: Catalogue, harvest: Any, made: Mapping[str, Any]) -> dict[str, Any]:
    """The card as a JSON value. made: what the generator says of how the items came about."""
    items: Sequence[Mapping[str, str]] = harvest.items
    found: dict[str, Any] = {
        "items": len(items),
        "wanted": config.items,
        "ended": made["ended"],
        "source": made["source"],
        "language": catalogue.language,
        "share_of_script": _rounded(_mean([share_of(catalogue.script, "\n".join(item.values())) for item in items])),
        "with_input": sum(1 for item in items if item["input"]),
        "fallen": dict(harvest.fallen),
        "samples_of_fallen": {rule: harvest.samples[rule] for rule in RULES if rule in harvest.samples},
        "lengths": {field: lengths([item[field] for item in items]) for field in FIELDS},
        "openings": dict(Counter(item["instruction"][:2] for item in items).most_common(OPENINGS)),
        "topics": dict(sorted(harvest.topics.items(), key=lambda named: (-named[1], named[0]))),
        "task_types": dict(sorted(harvest.task_types.items(), key=lambda named: (-named[1], named[0]))),
        "examples": [dict(item) for item in spread(items, EXAMPLES)],
        "settings": configuration_of(config),
    }
    if made["source"] == "import":
        return found | {"records": dict(made["records"])}
    budget, ledger = config.budget, made["ledger"]
    billed, charged = ledger.billed, ledger.charged
    return found | {
        "model": {"name": config.model, "base_url": config.base_url, "says_it_is": sorted(ledger.models)},
        "began": ledger.first,
        "date": ledger.last,
        "requests": {
            "answered": len(ledger.settled),
            "sent": sum(ledger.attempts.values()),
            "failures": dict(sorted(ledger.failures.items())),
        },
        "understood": dict(ledger.dialect or {}),
        "cost": {
            "billed": asdict(billed),
            "at_most": asdict(charged),
            "billed_cost": round(budget.cost(billed), 6) if budget.priced else None,
            "at_most_cost": round(budget.cost(charged), 6) if budget.priced else None,
            "tokens_per_item": round(billed.total / max(1, len(items)), 1),
        },
    }


def summary(content: Mapping[str, Any]) -> str:
    """One line for the log."""
    few = 0 < content["items"] < content["wanted"]
    text = f"only {content['items']:,} of {content['wanted']:,} items" if few else f"{content['items']:,} items"
    text += f", {sum(content['fallen'].values()):,} left out"
    if content["source"] == "import":
        return f"{text}, of {sum(content['records'].values()):,} records"
    cost = content["cost"]
    text += f", {content['requests']['answered']:,} answers, {sum(cost['billed'].values()):,} tokens"
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
    counts = [0] * len(EDGES)
    for length in found:
        counts[sum(1 for edge in EDGES if edge <= length) - 1] += 1
    return {
        "texts": len(found),
        "mean": _rounded(_mean(found)),
        "median": found[len(found) // 2] if found else 0,
        "p95": found[min(len(found) - 1, len(found) * 95 // 100)] if found else 0,
        "longest": found[-1] if found else 0,
        "histogram": dict(zip(map(str, EDGES), counts)),
    }


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """`count` of them at equal distances, the first among them."""
    step = max(1, len(items) // count)
    return list(items[::step][:count])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _rounded(value: float) -> float:
    return round(value, 3)


# --- the page ---------------------------------------------------------------------------------------------------------


def page(content: Mapping[str, Any]) -> str:
    """The card as one HTML page."""
    return render(
        Path(__file__).with_name("page.html"),
        card=content,
        headlines=_headlines(content),
        ending=ENDINGS[content["ended"]],
        fallen=bars({rule: count for rule, count in content["fallen"].items() if count}),
        rules=RULES,
        histograms=[
            _histogram(field, content["lengths"][field]) for field in FIELDS if content["lengths"][field]["texts"]
        ],
        topics=bars(_named(content["topics"])),
        task_types=bars(_named(content["task_types"])),
        unnamed=content["topics"].get(UNNAMED, 0),
        openings=bars(content["openings"]),
        settings={name: value for name, value in content["settings"].items() if value not in ("", 0, -1)},
    )


def _named(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if name != UNNAMED}


def bars(counts: Mapping[str, int]) -> list[tuple[str, float, int]]:
    """(name, length in percent of the longest, count) of each."""
    longest = max(counts.values(), default=0)
    return [(name, 100 * count / longest, count) for name, count in counts.items()]


def _headlines(content: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(figure, what it is, note): what is to be seen first."""
    left_out = sum(content["fallen"].values())
    looked_at = content["items"] + left_out
    wanted = f"of {content['wanted']:,} wanted" if content["wanted"] else ""
    found = [(f"{content['items']:,}", "items", wanted)]
    found.append((f"{left_out / max(1, looked_at):.0%}", "left out", f"{left_out:,} of {looked_at:,}"))
    found.append((f"{content['lengths']['output']['median']:,}", "characters an output", "half of them are shorter"))
    if content["source"] == "model":
        cost = content["cost"]
        tokens = sum(cost["billed"].values())
        if cost["billed_cost"] is None:
            found.append((_short(tokens), "tokens", f"{cost['tokens_per_item']:,.0f} an item"))
        else:
            price = 1000 * cost["billed_cost"] / max(1, content["items"])
            found.append(
                (f"{cost['billed_cost']:,.2f}", "cost", f"{price:,.2f} a thousand items, {_short(tokens)} tokens")
            )
    else:
        found.append((f"{sum(content['records'].values()):,}", "records read", ""))
    return found


def _short(number: int) -> str:
    """1,234 → 1.2 k."""
    for unit, size in (("M", 1_000_000), ("k", 1_000)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:,}"


def _histogram(field: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """A field's lengths as columns: (from, height in percent, count), the empty ends left off."""
    columns = bars(found["histogram"])
    filled = [index for index, (_, _, count) in enumerate(columns) if count]
    return {"field": field, "columns": columns[filled[0] : filled[-1] + 1], **found}
