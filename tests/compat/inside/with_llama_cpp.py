"""llama-cpp-python: each GGUF's ids, its chat template, its logits."""

from pathlib import Path
from typing import Any

import gguf
from common import ANSWER, CHATS, LINES, asked, attempt, finish, probe, texts
from llama_cpp.llama_chat_format import Jinja2ChatFormatter


def chat_ids(model: Any) -> list[list[int]]:
    pieces = {name: model.detokenize([index], special=True).decode() for name, index in
              (("bos_token", model.token_bos()), ("eos_token", model.token_eos()))}  # fmt: skip
    formatter = Jinja2ChatFormatter(template=model.metadata["tokenizer.chat_template"], **pieces)
    prompts = [formatter(messages=chat) for chat in CHATS]
    return [model.tokenize(one.prompt.encode(), add_bos=not one.added_special, special=True) for one in prompts]


def seen(of: str, folder: str, precision: str) -> dict[str, Any]:
    model = gguf.opened(str(Path(folder, f"model-{precision}.gguf")))
    found = {"ids": gguf.ids(model, LINES), "probe": gguf.ids(model, probe(of)), "chats": chat_ids(model)}
    found["logits"] = gguf.logits(model, texts(of))
    greedy = {"temperature": 0.0, "max_tokens": ANSWER}
    said = [model.create_chat_completion(messages=chat, **greedy)["choices"][0] for chat in CHATS]
    found["spoken"] = [one["message"]["content"] for one in said]
    return {**found, "precision": {"f32": "float32"}.get(precision, precision)}


for name, path in asked["gguf"].items():
    for kind in ("f32", "f16", "q8_0"):
        attempt(f"GGUF {kind}", seen, name, path, kind)
finish("llama-cpp-python")
