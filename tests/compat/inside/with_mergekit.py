"""mergekit: two of our models made one, by its command; what it saves is held against the sum done by hand, and against
what merge_models makes of the same."""

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


def merged(of: str, method: str, other: str = "", **more: Any) -> dict[str, Any]:
    one, out = asked["models"][of], OUT / f"{method}-{of}-{len(more)}"
    shares: dict[str, Any] = {
        "passthrough": {"models": [{"model": one}]},
        "slerp": {"models": [{"model": one}, {"model": other}], "base_model": one, "parameters": {"t": 0.5}},
        "linear": {"models": [{"model": one, "parameters": {"weight": 0.25}},
                              {"model": other, "parameters": {"weight": 0.75}}]},
    }[method]  # fmt: skip
    config = OUT / f"{out.name}.json"  # a JSON file is a YAML file
    config.write_text(json.dumps({"merge_method": method, "dtype": "float32", **shares, **more}))
    subprocess.run(["mergekit-yaml", str(config), str(out)], check=True, timeout=300)
    saved, first = tensors(out), tensors(one)
    for name, tensor in saved.items() if method != "slerp" else ():
        expected = first[name].float()
        if method == "linear":
            expected = 0.25 * expected + 0.75 * tensors(other)[name].float()
        assert (tensor - expected).abs().max() < 1e-6, f"{name} is no mean"
    found = {"saved": str(out), "kind": "model", "logits": logits(load(str(out)), of)}
    # the chat template is of one of the two, which mergekit chooses
    return {**found, "ids": ids(AutoTokenizer.from_pretrained(out))["ids"]}


def with_tokenizer(of: str, other: str) -> dict[str, Any]:
    return merged(of, "linear", other, tokenizer_source=asked["models"][of])


def as_ours(of: str, method: str, other: str, base: str = "") -> dict[str, Any]:
    """Our merge (components/merge_models) of two models beside mergekit's."""
    one, blend = asked["models"][of], asked["blends"][method]
    out, weight = OUT / f"ours-{method}", blend["weight"]
    groups = [{"filter": "self_attn", "value": blend.get("attention", weight)},
              {"filter": "mlp", "value": blend.get("feed_forward", weight)}, {"value": weight}]  # fmt: skip
    config: dict[str, Any] = {
        "linear": {"merge_method": "linear", "models": [{"model": one, "parameters": {"weight": 1 - weight}},
                                                        {"model": other, "parameters": {"weight": weight}}]},
        "slerp": {"merge_method": "slerp", "base_model": one, "models": [{"model": one}, {"model": other}],
                  "parameters": {"t": groups}},
        "chat-vector": {"merge_method": "task_arithmetic", "base_model": base, "parameters": {"normalize": False},
                        "models": [{"model": one, "parameters": {"weight": 1.0}},
                                   {"model": other, "parameters": {"weight": weight}}]},
    }[method]  # fmt: skip
    (OUT / f"{out.name}.json").write_text(json.dumps({"dtype": "float32", **config}))
    subprocess.run(["mergekit-yaml", str(OUT / f"{out.name}.json"), str(out)], check=True, timeout=300)
    theirs, ours = tensors(out), tensors(blend["ours"])
    assert theirs.keys() == ours.keys()
    same = [torch.equal(theirs[name], ours[name]) for name in ours]
    most = max(float((theirs[name] - ours[name]).abs().max() / theirs[name].abs().max()) for name in ours)
    return {"tensors": [sum(same), len(same), most]}


pretrained = asked["adapters"]["lora"][1]
attempt("linear", merged, "merged", "linear", pretrained)
attempt("slerp", merged, "merged", "slerp", pretrained)
attempt("linear, tokenizer_source", with_tokenizer, "merged", pretrained)
attempt("passthrough", merged, "tied", "passthrough")
attempt("passthrough", merged, "stretched", "passthrough")
attempt("merge_models, linear", as_ours, "merged", "linear", pretrained)
attempt("merge_models, slerp by groups", as_ours, "merged", "slerp", pretrained)
extended = asked["adapters"]["rows"][1]
attempt("merge_models, chat-vector (task_arithmetic)", as_ours, "merged", "chat-vector", pretrained, extended)
finish("mergekit", "transformers")
