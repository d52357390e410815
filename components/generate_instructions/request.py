"""What the model is asked: so many items, on topics and of task types drawn from topics.yaml, as a JSON list.

The recipe's request: 20 items on 10 topics of 10 task types, short inputs and outputs, answers in Chinese unless the
task asks otherwise, nothing that text alone cannot do.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

DRAWN = 10
"""Topics, and task types, that one request names."""
EXAMPLES = 3
"""Seed items that one request shows."""


@dataclass(frozen=True)
class Catalogue:
    """What instructions are about, and what they ask for."""

    topics: Sequence[str]
    task_types: Sequence[str]


def load_catalogue() -> Catalogue:
    import yaml

    value = yaml.safe_load((Path(__file__).parent / "topics.yaml").read_text("utf-8"))
    return Catalogue(tuple(value["topics"]), tuple(value["task_types"]))


def request(
    catalogue: Catalogue, count: int, seeds: Sequence[Mapping[str, str]], chance: random.Random
) -> list[dict[str, str]]:
    """The messages of one request for `count` items."""
    topics = chance.sample(catalogue.topics, min(DRAWN, len(catalogue.topics)))
    types = chance.sample(catalogue.task_types, min(DRAWN, len(catalogue.task_types)))
    asked = (
        f"请编写 {count} 条互不相同的中文指令数据，用来训练一个只能读写文字的助手。\n\n"
        f"题材从这些里选，每条换一个：{'、'.join(topics)}。\n"
        "任务类型从这些里选，尽量都用到：\n" + "".join(f"- {name}\n" for name in types) + "\n"
        "要求：\n"
        "1. 每条是一个 JSON 对象，有三个字段：instruction（指令）、input（指令所需的材料，没有就写空字符串）、"
        "output（完整、正确的回答）。\n"
        "2. 指令的句式和开头要多样，可以是问句，也可以是祈使句；不要提到“这条指令”或“人工智能”。\n"
        "3. input 是具体的内容，不超过 100 个汉字；不要写“某段文字”之类的占位。\n"
        "4. output 不超过 300 个汉字；除非任务要求别的语言，一律用中文。\n"
        "5. 不要需要图片、声音、联网或实际动手才能完成的任务。\n"
        f"6. 只输出一个有 {count} 个对象的 JSON 数组，前后不要有别的文字。"
    )
    if seeds:
        shown = chance.sample(list(seeds), min(EXAMPLES, len(seeds)))
        asked += "\n\n例子（不要照抄）：\n" + "\n".join(json.dumps(dict(item), ensure_ascii=False) for item in shown)
    return [{"role": "user", "content": asked}]
