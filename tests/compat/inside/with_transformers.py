"""transformers and peft: load, ask, save again, merge."""

from typing import Any

from common import OUT, asked, attempt, finish
from hugging_face import ids, load, logits
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoTokenizer, __version__


def folder(of: str) -> dict[str, Any]:
    path = asked["models"][of]
    return {**ids(AutoTokenizer.from_pretrained(path), of), "logits": logits(load(path), of)}


def saved(of: str, **more: Any) -> dict[str, Any]:
    path, out = asked["models"][of], OUT / "-".join([of, *more])
    model, tokenizer = load(path), AutoTokenizer.from_pretrained(path)
    model.save_pretrained(out, **more)
    tokenizer.save_pretrained(out)
    return {"saved": str(out), "kind": "model", "logits": logits(model, of)}


def pickled(of: str) -> dict[str, Any]:
    return saved(of, safe_serialization=False)


def adapter(of: str) -> dict[str, Any]:
    path, base = asked["adapters"][of]
    return {"logits": logits(PeftModel.from_pretrained(load(base), path), of)}


def adapter_alone(of: str) -> dict[str, Any]:
    path, _ = asked["adapters"][of]
    return {"logits": logits(AutoPeftModelForCausalLM.from_pretrained(path), of)}


def adapter_saved(of: str) -> dict[str, Any]:
    path, base = asked["adapters"][of]
    model, out = PeftModel.from_pretrained(load(base), path), OUT / f"adapter-{of}"
    model.save_pretrained(out)
    return {"saved": str(out), "kind": "adapter", "base": asked["based"][of], "logits": logits(model, of)}


def merged(of: str) -> dict[str, Any]:
    path, base = asked["adapters"][of]
    model, out = PeftModel.from_pretrained(load(base), path).merge_and_unload(), OUT / f"merged-{of}"
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    return {"saved": str(out), "kind": "model", "logits": logits(model, of)}


for name in asked["models"]:
    attempt("model folder", folder, name)
    attempt("save_pretrained", saved, name)
if __version__ < "5":
    attempt("save_pretrained, .bin", pickled, "merged")
for name in asked["adapters"]:
    attempt("PeftModel.from_pretrained", adapter, name)
    attempt("AutoPeftModelForCausalLM", adapter_alone, name)
    attempt("PeftModel.save_pretrained", adapter_saved, name)
    attempt("merge_and_unload, save_pretrained", merged, name)
finish("transformers", "peft")
