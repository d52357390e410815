"""LLaMA-Factory: SFT of some steps with LoRA, and its export of model and adapter; SFT in full."""

import importlib.machinery
import json
import sys
import types
from typing import Any

from common import CHATS, OUT, asked, attempt, finish

# it imports torchaudio for sound; PyPI's is a CUDA build
sys.modules["torchaudio"] = types.ModuleType("torchaudio")
sys.modules["torchaudio"].__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)

from hugging_face import ids, load, logits  # noqa: E402 - torchaudio first
from llamafactory.data.template import get_template_and_fix_tokenizer  # noqa: E402
from llamafactory.hparams import DataArguments  # noqa: E402
from llamafactory.train.tuner import export_model, run_exp  # noqa: E402
from peft import PeftModel  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

DATA = OUT / "data"
DATA.mkdir(exist_ok=True)
ITEMS = [
    {"instruction": "这句话用什么结尾？", "input": f"老师说{sign}", "output": f"用{sign}"} for sign in "。！？；" * 8
]
(DATA / "items.json").write_text(json.dumps(ITEMS, ensure_ascii=False), encoding="utf-8")
(DATA / "dataset_info.json").write_text(json.dumps({"items": {"file_name": "items.json"}}))


def trained(of: str, kind: str, template: str | None = "alpaca", **more: Any) -> dict[str, Any]:
    path, out = asked["models"][of], OUT / f"{kind}-{of}-{template}"
    run_exp(
        {
            "model_name_or_path": path, "stage": "sft", "do_train": True, "finetuning_type": kind, "dataset": "items",
            "dataset_dir": str(DATA), "template": template, "cutoff_len": 256, "output_dir": str(out), "max_steps": 6,
            "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 2, "save_steps": 100,
            "report_to": "none", "use_cpu": True, "seed": 3, "overwrite_cache": True, **more,
        }
    )  # fmt: skip
    model = PeftModel.from_pretrained(load(path), out) if kind == "lora" else load(str(out))
    found = {"saved": str(out), "kind": "adapter" if kind == "lora" else "model", "base": of}
    tokenizer = AutoTokenizer.from_pretrained(out)
    return {**found, "logits": logits(model, of), "ids": ids(tokenizer)["ids"]}


def prompted(of: str, name: str | None) -> dict[str, Any]:
    """Where no template is named, it makes one of the folder's."""
    tokenizer = AutoTokenizer.from_pretrained(asked["models"][of])
    template = get_template_and_fix_tokenizer(tokenizer, DataArguments(template=name))
    answered = [[*chat, {"role": "assistant", "content": "好"}] for chat in CHATS]
    return {"chats": [list(template.encode_oneturn(tokenizer, chat)[0]) for chat in answered]}


def with_chatml(of: str) -> dict[str, Any]:
    """Two more tokens, and rows up to a multiple of 64."""
    return trained(of, "full", "chatml", resize_vocab=True)


def exported(of: str) -> dict[str, Any]:
    path, adapter, out = asked["models"][of], OUT / f"lora-{of}-alpaca", OUT / f"export-{of}"
    export_model(
        {
            "model_name_or_path": path, "adapter_name_or_path": str(adapter), "template": "alpaca",
            "finetuning_type": "lora", "export_dir": str(out), "export_size": 1, "export_device": "cpu",
            "infer_dtype": "float32",
        }
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(out)
    found = {"saved": str(out), "kind": "model", "logits": logits(load(str(out)), of)}
    return {**found, "ids": ids(tokenizer)["ids"]}


for name in ("merged", "tied", "stretched"):
    attempt("SFT, LoRA", trained, name, "lora")
    attempt("export of model and adapter", exported, name)
attempt("SFT in full", trained, "merged", "full")
attempt("SFT in full, ChatML, resize_vocab", with_chatml, "merged")
attempt("prompts of its own alpaca", prompted, "merged", "alpaca")
attempt("prompts by the folder's template", prompted, "merged", None)
finish("llamafactory", "transformers", "peft", "trl")
