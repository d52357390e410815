"""mergekit: two of our models made one, by its command; what it saves is held against the sum done by hand."""

import json
import subprocess
from pathlib import Path
from typing import Any

import torch
from common import OUT, asked, attempt, finish
from hugging_face import ids, load, logits
from safetensors.torch import load_file
from transformers import AutoTokenizer


def tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in Path(folder).glob("*.safetensors") for name, tensor in load_file(path).items()}


def merged(of: str, other: str, method: str, **more: Any) -> dict[str, Any]:
    one, out = asked["models"][of], OUT / f"{method}-{of}-{len(more)}"
    if method == "slerp":
        shares: dict[str, Any] = {
            "base_model": one,
            "parameters": {"t": 0.5},
            "models": [{"model": one}, {"model": other}],
        }
    else:
        shares = {"models": [{"model": one, "parameters": {"weight": 0.25}},
                             {"model": other, "parameters": {"weight": 0.75}}]}  # fmt: skip
    config = OUT / f"{out.name}.json"  # a JSON file is a YAML file
    config.write_text(json.dumps({"merge_method": method, "dtype": "float32", **shares, **more}))
    subprocess.run(["mergekit-yaml", str(config), str(out)], check=True, timeout=300)
    saved, first, second = tensors(out), tensors(one), tensors(other)
    if method == "linear":
        for name, tensor in saved.items():
            expected = 0.25 * first[name].float() + 0.75 * second[name].float()
            assert (tensor - expected).abs().max() < 1e-6, f"{name} is no mean"
    found = {"saved": str(out), "kind": "model", "logits": logits(load(str(out)), of)}
    return {**found, **ids(AutoTokenizer.from_pretrained(out))}


pretrained = asked["adapters"]["lora"][1]
attempt("linear", merged, "merged", pretrained, "linear")
attempt("slerp", merged, "merged", pretrained, "slerp")
attempt("linear, its tokenizer_source", lambda of: merged(of, pretrained, "linear", tokenizer_source="union"), "merged")
attempt("linear", merged, "tied", asked["models"]["tied"], "linear")
attempt("linear", merged, "stretched", asked["models"]["stretched"], "linear")
finish("mergekit", "transformers")
