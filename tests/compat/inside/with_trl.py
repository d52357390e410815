"""trl: SFT of some steps on our model, LoRA and in full, and what it saves."""

from typing import Any

import torch
from common import CHATS, OUT, asked, attempt, finish
from datasets import Dataset
from hugging_face import ids, load, logits
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

CONVERSATIONS = Dataset.from_list(
    [{"messages": [CHATS[0][0], {"role": "assistant", "content": f"用{sign}"}]} for sign in "。！？；" * 8]
)


def trained(of: str, name: str, lora: LoraConfig | None, answers: bool = False) -> dict[str, Any]:
    path, out = asked["models"][of], OUT / f"{name}-{of}"
    torch.manual_seed(0)
    arguments = SFTConfig(
        output_dir=str(out), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-3, report_to=[],
        use_cpu=True, bf16=False, save_strategy="no", max_length=256, seed=3,
        assistant_only_loss=answers,
    )  # fmt: skip
    trainer = SFTTrainer(
        load(path), arguments, train_dataset=CONVERSATIONS, peft_config=lora,
        processing_class=AutoTokenizer.from_pretrained(path),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(out))
    found = {"saved": str(out), "logits": logits(trainer.model, of), "kind": "adapter" if lora else "model"}
    return {**found, **ids(trainer.processing_class), "base": of}


lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
rows = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], modules_to_save=["embed_tokens", "lm_head"])
for model in ("merged", "tied", "stretched"):
    attempt("SFTTrainer in full", trained, model, "full", None)
    attempt("SFTTrainer, LoRA", trained, model, "lora", lora)
    attempt("SFTTrainer, LoRA and rows", trained, model, "rows", rows)
for model in ("merged", "marked"):
    attempt("SFTTrainer, assistant_only_loss", trained, model, "answers", None, True)
finish("trl", "transformers", "peft")
