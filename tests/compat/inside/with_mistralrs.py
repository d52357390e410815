"""mistral.rs: folders, an adapter and GGUF; ids and greedy answers, with their log probabilities."""

from typing import Any

from common import ANSWER, CHATS, LINES, asked, attempt, finish, probe
from mistralrs import ChatCompletionRequest, LoraAdapter, ModelDType, Runner, Which


def seen(of: str, which: Any, precision: str = "float32", adapter: str | None = None) -> dict[str, Any]:
    runner = Runner(which=which, no_paged_attn=True, token_source="none")
    said = []
    for chat in CHATS:
        request = ChatCompletionRequest(
            messages=chat, model="default", max_tokens=ANSWER, temperature=0.0, logprobs=True, top_logprobs=1,
            adapter=adapter,
        )  # fmt: skip
        said.append(runner.send_chat_completion_request(request).choices[0])
    return {
        "ids": [list(runner.tokenize_text(line, True, None)) for line in LINES],
        "probe": [list(runner.tokenize_text(line, True, None)) for line in probe(of)],
        "spoken": [one.message.content for one in said],
        "chosen": [[token.logprob for token in one.logprobs.content] for one in said],
        "precision": precision,
    }


for name, path in asked["models"].items():
    attempt("model folder", lambda of, path: seen(of, Which.Plain(path, dtype=ModelDType.F32)), name, path)


def adapter(of: str) -> dict[str, Any]:
    path, base = asked["adapters"][of]
    return seen(of, Which.Lora(base, adapters=[LoraAdapter(of, path)], dtype=ModelDType.F32), adapter=of)


for name in asked["adapters"]:
    attempt("adapter", adapter, name)


def quantised(of: str, kind: str, tokenizer: str | None) -> dict[str, Any]:
    which = Which.GGUF(asked["gguf"][of], f"model-{kind}.gguf", tokenizer_json=tokenizer, dtype=ModelDType.F32)
    return seen(of, which, {"f32": "float32"}.get(kind, kind))


for name, path in asked["models"].items():
    attempt("GGUF, its own tokenizer", quantised, name, "f16", None)
    for kind in ("f32", "f16", "q8_0"):
        attempt(f"GGUF {kind}, the folder's tokenizer.json", quantised, name, kind, f"{path}/tokenizer.json")
finish("mistralrs")
