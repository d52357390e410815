"""lm-eval: its ids of texts, and the log likelihoods that its scores are made of."""

from typing import Any

from common import CHATS, HEAD, LINES, asked, attempt, finish, probe
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM


def seen(of: str, **more: str) -> dict[str, Any]:
    model = HFLM(pretrained=more.get("base", asked["models"].get(of)), peft=more.get("peft"), dtype="float32",
                 device="cpu", batch_size=1)  # fmt: skip
    pairs = [(line[:HEAD], line[HEAD:]) for line in LINES if not any(map(str.isspace, line[:HEAD]))]
    asked_for = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    return {
        "ids": [model.tok_encode(line, add_special_tokens=True) for line in LINES],
        "probe": [model.tok_encode(line, add_special_tokens=True) for line in probe(of)],
        "chats": [model.tok_encode(model.apply_chat_template(chat)) for chat in CHATS],
        "likelihood": [[value for value, _ in model.loglikelihood(asked_for, disable_tqdm=True)]],
    }


def adapter(of: str) -> dict[str, Any]:
    peft, base = asked["adapters"][of]
    return seen(of, peft=peft, base=base)


for name in asked["models"]:
    attempt("model folder", seen, name)
for name in asked["adapters"]:
    attempt("peft=adapter", adapter, name)
finish("lm-eval", "transformers", "peft")
