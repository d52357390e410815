"""xllamacpp: llama.cpp's server on loopback, in this process."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import xllamacpp
from common import ANSWER, CHATS, LINES, asked, attempt, finish, probe, texts


def seen(of: str, folder: str, precision: str) -> dict[str, Any]:
    params = xllamacpp.CommonParams()
    params.model.path = str(Path(folder, f"model-{precision}.gguf"))
    params.n_ctx, params.n_parallel, params.use_jinja, params.port = 512, 1, True, 0
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)

    def ask(path: str, **body: Any) -> Any:
        request = urllib.request.Request(f"{server.listening_address}{path}", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def ids(text: str, begin: bool) -> list[int]:
        return list(ask("/tokenize", content=text, add_special=begin, parse_special=True)["tokens"])

    # a row that no token names is padding, and no GGUF has it
    pieces = asked["said"][of]["pieces"]

    def following(text: list[int]) -> np.ndarray:
        told = ask("/completion", prompt=text, n_predict=1, n_probs=pieces, temperature=0, cache_prompt=False)
        found = np.full(pieces, np.nan)
        # nothing is told where the end is the likeliest
        for one in told.get("completion_probabilities", [{"top_logprobs": []}])[0]["top_logprobs"]:
            found[one["id"]] = one["logprob"]
        return found

    # without logprobs: of pieces that are single bytes, it tells none
    greedy = {"temperature": 0, "max_tokens": ANSWER}
    said = [ask("/v1/chat/completions", messages=chat, **greedy)["choices"][0] for chat in CHATS]
    rendered = [ask("/apply-template", messages=chat)["prompt"] for chat in CHATS]
    return {
        "ids": [ids(line, True) for line in LINES],
        "probe": [ids(line, True) for line in probe(of)],
        # the template writes BOS, which llama.cpp's server takes off again
        "chats": [ids(text, True) for text in rendered],
        "next": [following(text) for text in texts(of)],
        "spoken": [one["message"]["content"] for one in said],
        "precision": {"f32": "float32"}.get(precision, precision),
    }


for name, path in asked["gguf"].items():
    for kind in ("f32", "f16", "q8_0"):
        attempt(f"GGUF {kind}", seen, name, path, kind)
finish("xllamacpp")
