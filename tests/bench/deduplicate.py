"""De-duplication by ROUGE-L > 0.7 while generating: ours over 100,000 questions, the recipe's loop over a part of them.

The recipe (Stanford's generator) scores each new question against every one before it with the rouge-score package.
That loop's cost grows with the square, so it runs over the first questions alone, and so do we beside it.
"""

import random
import time
from pathlib import Path
from typing import Any

from tests.bench.measure import Table, measured

ALL, PART = 100_000, 400
FRACTION_NEAR = 0.1
"""Of the questions, those that are an earlier one with a few characters changed."""
_PARTS = {
    "begins": "请 请你 帮我 如何 为什么 怎样 能否 试着 用一段话 用三句话 根据材料 结合实际 简要地 详细地 分步骤",
    "does": "说明 比较 列举 解释 总结 翻译 改写 评价 设计 描述 分析 推荐 续写 概括 判断",
    "ends": "并举一个例子 不超过五十个字 要有条理 语气要正式 让孩子也能听懂 并说明理由 分三点来写 避免重复 写成一封信",
}


def questions(count: int) -> list[str]:
    """Chinese instructions of 20 to 70 characters: common beginnings and endings, and words by a Zipf law."""
    chance = random.Random(7)
    words = [
        "".join(chr(0x4E00 + chance.randint(0, 2500)) for _ in range(chance.choice((1, 2, 2, 2, 3))))
        for _ in range(8000)
    ]
    weights = [1 / (rank + 10) for rank in range(len(words))]
    begins, does, ends = (listed.split() for listed in _PARTS.values())
    made: list[str] = []
    while len(made) < count:
        if made and chance.random() < FRACTION_NEAR:
            old = list(chance.choice(made))
            for _ in range(chance.randint(1, 4)):
                old[chance.randrange(len(old))] = chr(0x4E00 + chance.randint(0, 2500))
            made.append("".join(old))
            continue
        middle = "".join(chance.choices(words, weights, k=chance.randint(6, 22)))
        made.append(f"{chance.choice(begins)}{chance.choice(does)}{middle}，{chance.choice(ends)}。")
    return made


def ours(count: int) -> dict[str, Any]:
    """All in order; the rate over the last tenth too, where the index is full."""
    from components.generate_instructions.dedup import Seen

    texts, seen, dropped = questions(count), Seen(), 0
    begin = last = time.perf_counter()
    for number, text in enumerate(texts):
        if number == count * 9 // 10:
            last = time.perf_counter()
        if seen.duplicate_of(text):
            dropped += 1
        else:
            seen.add(text)
    end = time.perf_counter()
    return {"seconds": end - begin, "last_tenth": (count - count * 9 // 10) / (end - last), "dropped": dropped}


def recipe(count: int) -> dict[str, Any]:
    """Each question against every one that was kept, as Stanford's generator does, a character a token."""
    from rouge_score import rouge_scorer

    texts, kept, dropped = questions(count), list[list[str]](), 0
    begin = time.perf_counter()
    for text in texts:
        tokens = [sign for sign in text if sign.isalnum()]
        scores = [rouge_scorer._score_lcs(tokens, other).fmeasure for other in kept]
        if scores and max(scores) > 0.7:
            dropped += 1
        else:
            kept.append(tokens)
    return {"seconds": time.perf_counter() - begin, "dropped": dropped}


def run(scratch: Path) -> list[Table]:
    """The table: rates, memory and what was dropped."""
    table = Table(
        "De-duplication, ROUGE-L > 0.7 against everything accepted",
        ("", "questions", "seconds", "questions/s", "over the last tenth", "dropped", "peak memory"),
    )
    for name, function, count in (
        ("rouge-score, one by one", recipe, PART),
        ("ours", ours, PART),
        ("ours", ours, ALL),
    ):
        cost = measured(function, count)
        found = cost.result
        last = f"{found['last_tenth']:,.0f}/s" if "last_tenth" in found else "–"
        figures = (f"{count:,}", f"{cost.wall:.1f}", f"{count / cost.wall:,.0f}", last, f"{found['dropped']:,}")
        table.rows.append((name, *figures, f"{cost.peak_mb:,.0f} MB"))
    dropped = [row[5] for row in table.rows[:2]]
    table.note = (
        "Bar: 100,000 at 200 a second or more on two cores. Both drop the same questions"
        f"{'' if dropped[0] == dropped[1] else ' (THEY DID NOT)'}; the plain loop's rate falls with the number kept."
    )
    return [table]
