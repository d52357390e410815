"""What the programs are given: small models, adapters and GGUF that our own stages publish, and what we say of them."""

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tests.byte_level_bases import SHAPES
from tests.small_models import model_of
from tests.texts import chinese_sentences, code_lines, llama_shaped, mixed_lines
from zhllama.inference.load import LoadedModel
from zhllama.stage.run import run_stage

SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
"""Heads of 32, as serving engines' kernels want them at least."""
LINES = (
    "今天早上，老师在图书馆找到这本书，内容丰富。",
    "The quick brown fox, 3.14 and more.",
    "def 函数(x): return x  # 中文注释 with English",
    "两个  空格   三个，\t制表\n换行\n\n空行",
    " 前面有空格 and behind ",
    "🤗 表情👍🏽和 👩‍👩‍👧‍👦，𠮷 é\x01",
    "（全角）！？：；“引号”《书名》",
)
CHATS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "这本书怎么样？"}],
    [
        {"role": "user", "content": "请问附近哪里可以买咖啡？"},
        {"role": "assistant", "content": "非常满意"},
        {"role": "user", "content": "Say it again, 再说一次。"},
    ],
)
BYTE_LEVEL = {"llama3": ("llama3", "llama 3", 0), "qwen": ("qwen2", "qwen", 287)}
"""Model → its architecture (tests/small_models.py), its base's tokenizer (tests/byte_level_bases.py), and how many
rows the base's tables have beyond that (to a multiple of 128, as Qwen's), of which MERGES fill some."""
MODELS = ("merged", "tied", "stretched", "marked", *BYTE_LEVEL)
"""float32 with two adapters merged in; one table for embedding and head, float16; rope linear, factor 4, float16; the
first with `{% generation %}` markers in its chat template; byte-level ones whose merges were continued, float32."""
HALF = ("tied", "stretched")
BASES = {"rows": "extended", "lora": "pretrained"}
"""Adapter → the model that it is for: LoRA with embeddings and head in full; LoRA alone."""
BLENDS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 0.75},
    "slerp": {"weight": 0.5, "attention": 0.3, "feed_forward": 0.6},
    "chat-vector": {"weight": 0.7},
}
"""What merge_models makes of `merged` and `pretrained`, in float32; the chat vector is what lies between `extended` and
`pretrained`, added to `merged`."""
HEAD = 3
MERGES = 200
"""Learned beyond those of a byte-level base."""
PROBE = 2000
"""Lines, at least."""
LONGEST = 1000
"""Signs of such a line, so that it has fewer ids than a byte-level model has positions."""
SPELLED = (
    "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|reserved_special_token_247|>", "[PAD]",
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool_call>", "</tool_call>",
    "</s>", "<s>", "<|", "|>", "<|eot_id", "<|EOT_ID|>", "< |im_end|>", "<|im_end|>\n",
)  # fmt: skip
"""Special tokens of one base or the other, which are text to the other, and what only resembles one."""
ANSWER = 8
"""Tokens of a greedy answer."""
TRAINING: dict[str, Any] = {
    "deepspeed": "none", "precision": "float32", "per_device_train_batch_size": 4, "save_steps": 0,
    "learning_rate": 3e-3,
}  # fmt: skip


@dataclass(frozen=True)
class Said:
    """What we make of a model: the ids of LINES, of CHATS and of a probe, one array of logits for each of the
    former, and the greedy answers to CHATS: ids, their log probabilities, text."""

    ids: list[list[int]]
    chats: list[list[int]]
    logits: list[np.ndarray]
    answers: list[list[int]]
    chosen: list[list[float]]
    spoken: list[str]
    likelihood: list[float]
    """Log likelihood of what follows the first HEAD signs of a line, where none of them is white space."""
    template: str
    pieces: int = 0
    """Without the rows that no token names."""
    probe: list[list[int]] = field(default_factory=list)

    @property
    def texts(self) -> list[list[int]]:
        return [*self.ids, *self.chats]


def logits_of(loaded: LoadedModel, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """An array a text: positions × words."""
    import torch

    with torch.no_grad():
        return [np.asarray(loaded.model(torch.tensor([list(text)])).logits[0].float()) for text in texts]


def said(loaded: LoadedModel, template: str, probe: Sequence[str] = ()) -> Said:
    """Its answers to this template's prompts; the ids of a probe as engines read it, special tokens in it as such."""
    from zhllama.tokenizer.chat import Chat

    ids = [loaded.prompt_ids(line) for line in LINES]
    chat = Chat(loaded.encoder, template)
    chats = [chat.ids(messages) for messages in CHATS]
    answers, chosen = [], []
    for prompt in chats:
        answer: list[int] = []
        likely: list[float] = []
        while len(answer) < ANSWER and (not answer or answer[-1] not in loaded.stops):
            last = log_softmax(logits_of(loaded, [[*prompt, *answer]])[0][-1])
            answer.append(int(last.argmax()))
            likely.append(float(last.max()))
        answers.append(answer)
        chosen.append(likely)
    spoken = [loaded.encoder.decode([index for index in answer if index not in loaded.stops]) for answer in answers]
    every = logits_of(loaded, [*ids, *chats])
    likelihood = []
    for line, sequence, scores in zip(LINES, ids, every):
        if not any(map(str.isspace, line[:HEAD])):
            begin = len(loaded.prompt_ids(line[:HEAD]))
            likely = log_softmax(scores[begin - 1 : -1])
            likelihood.append(float(np.take_along_axis(likely, np.array(sequence[begin:])[:, None], 1).sum()))
    probed = [[*loaded.encoder.begin, *chat.encode(line)] for line in probe]
    pieces = loaded.encoder.size
    return Said(ids, chats, every, answers, chosen, spoken, likelihood, template, pieces, probed)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def template_of(model: str) -> str:
    """The chat template that a model carries."""
    from zhllama.artifacts.open import open_artifact
    from zhllama.weights.chat_template import default_of, template_in

    return default_of(template_in(open_artifact(model), "--model"))


def seed(folder: Path, **config: Any) -> str:
    """A LLaMA of random weights as somebody else publishes one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    half = config.pop("half", False)
    torch.manual_seed(16)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=700, max_position_embeddings=512, initializer_range=0.08, **SHAPE, **config)
    )
    if half:
        # these are not trained: no answer is to have a byte alone, of which every program makes another text
        model.half().lm_head.weight.data[3:259] *= 0.1
    model.save_pretrained(folder)
    lines = (" ".join(line.split()) for line in islice(code_lines(), 6000))
    (folder / "tokenizer.model").write_bytes(llama_shaped(lines, 700))
    return str(folder)


def byte_level_seed(folder: Path, kind: str, tokenizer: str, spare: int) -> str:
    """A byte-level model of random weights, likewise; `spare`: rows beyond the tokenizer's."""
    import torch

    from zhllama.artifacts.open import open_artifact
    from zhllama.tokenizer.vocabulary import load_encoder

    folder.mkdir()
    lines = [*islice(code_lines(), 6000), *islice(chinese_sentences(), 40)]
    for name, content in SHAPES[tokenizer](lines, 1500).items():
        (folder / name).write_bytes(content)
    encoder = load_encoder(open_artifact(str(folder)), "--model")
    ids = {"bos_token_id": encoder.bos, "eos_token_id": encoder.eos, "pad_token_id": encoder.pad}
    # rows of their own for the head: with those of the embedding, a random model answers what it was asked last
    shape = {**SHAPE, "num_key_value_heads": 2, "max_position_embeddings": 4096, "tie_word_embeddings": False}
    model = model_of(kind, vocab_size=encoder.size + spare, **shape, **ids)
    with torch.no_grad():
        # no answer is one of them, as in a model that was trained
        model.lm_head.weight[encoder.size :] *= 0.01
    model.save_pretrained(folder)
    return str(folder)


def probe_lines() -> list[str]:
    """PROBE different lines or more: Chinese, English, code, white space, emoji, rare signs; digits; SPELLED amidst all
    that. None is empty, which is nothing to answer."""
    chance = random.Random(31)
    mixed = [line[:LONGEST] for line in mixed_lines(2200)]
    digits = ["".join(chance.choices("0123456789", k=length)) for length in range(1, 61)]
    numbers = [chance.choice(("{} {}", "{},{}", "{}.{}年", "{}/{}", "¥{}：{}", "-{}e{}")) for _ in range(120)]
    lines = [*mixed, *digits, *(text.format(*chance.choices(digits[:14], k=2)) for text in numbers)]
    for line in chance.sample(mixed, 300):
        at = chance.randrange(len(line) + 1)
        lines.append(line[:at] + "".join(chance.choices(SPELLED, k=chance.randint(1, 3))) + line[at:])
    found = [line for line in dict.fromkeys([*SPELLED, *lines]) if line]
    assert len(found) >= PROBE
    return found


def make(folder: Path) -> dict[str, str]:
    """Name → reference of what was made: MODELS and `gguf-` of each, the adapters BASES and what they are for, `blend-`
    of BLENDS."""
    from components.export_model.exporter import export_model
    from components.export_model.options import ExportModel
    from components.extend_tokenizer.extender import extend_tokenizer
    from components.extend_tokenizer.options import ExtendTokenizer
    from components.finetune.options import Finetune
    from components.merge_adapters.merger import merge_adapters
    from components.merge_adapters.options import MergeAdapters
    from components.merge_models.merger import merge_models
    from components.merge_models.options import MergeModels
    from components.prepare_dataset.options import PrepareDataset
    from components.prepare_dataset.preparer import prepare_dataset
    from components.pretrain.options import Pretrain
    from components.train_tokenizer.options import TrainTokenizer
    from components.train_tokenizer.sentencepiece_trainer import train_tokenizer
    from zhllama.training.stage import run_training

    store = str(folder / "store")
    (folder / "text").mkdir()
    sentences = list(islice(chinese_sentences(), 600))
    (folder / "text" / "text.txt").write_text("\n".join(sentences), encoding="utf-8")
    (folder / "items.json").write_text(items(sentences[:60]), encoding="utf-8")
    text = str(folder / "text")
    made = {"chinese": run_stage(TrainTokenizer(store=store, text=text, vocab_size=700), train_tokenizer).reference}
    seeds: dict[str, dict[str, Any]] = {
        "extended": {"num_key_value_heads": 2},
        "tied": {"tie_word_embeddings": True, "half": True},
        "stretched": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}, "half": True},
    }
    for name, config in seeds.items():
        model = seed(folder / f"seed-{name}", **config)
        options = ExtendTokenizer(store=store, model=model, chinese_tokenizer=made["chinese"])
        made[name] = run_stage(options, extend_tokenizer).reference
    for name, base in BYTE_LEVEL.items():
        model = byte_level_seed(folder / f"seed-{name}", *base)
        learn = TrainTokenizer(store=store, text=text, base=model, vocab_size=MERGES)
        learned = run_stage(learn, train_tokenizer).reference
        options = ExtendTokenizer(store=store, model=model, chinese_tokenizer=learned)
        made[name] = run_stage(options, extend_tokenizer).reference
    prepare = {"store": store, "tokenizer": made["extended"], "validation_fraction": 0.1}
    made["text"] = run_stage(PrepareDataset(text=text, block_size=64, **prepare), prepare_dataset).reference
    taught = PrepareDataset(instructions=str(folder / "items.json"), block_size=128, **prepare)
    made["items"] = run_stage(taught, prepare_dataset).reference
    trained = Pretrain(
        store=store, stage="lora", model=made["extended"], dataset=made["text"], max_steps=20, **TRAINING
    )
    made["rows"] = run_stage(trained, run_training).reference
    merging = MergeAdapters(store=store, model=made["extended"], adapters=made["rows"])
    made["pretrained"] = run_stage(merging, merge_adapters).reference
    tuned = Finetune(store=store, model=made["pretrained"], dataset=made["items"], max_steps=80, **TRAINING)
    made["lora"] = run_stage(tuned, run_training).reference
    both = MergeAdapters(store=store, model=made["pretrained"], adapters=made["lora"])
    made["merged"] = run_stage(both, merge_adapters).reference
    for method, weights in BLENDS.items():
        base = made["extended"] if method == "chat-vector" else ""
        three = {"model": made["merged"], "other": made["pretrained"], "base": base}
        blend: Any = {"method": method, **three, **weights}
        made[f"blend-{method}"] = run_stage(MergeModels(store=store, **blend), merge_models).reference
    made["marked"] = marked(Path(made["merged"]).parent, folder / "marked")
    for model in MODELS:
        export = ExportModel(store=store, model=made[model], format="gguf", quantization="f32,f16,q8_0")
        made[f"gguf-{model}"] = run_stage(export, export_model).reference
    return made


def marked(model: Path, folder: Path) -> str:
    """The model with the markers in its template by which trl knows what an assistant said."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("manifest.json", ".*"))
    path, before = folder / "tokenizer_config.json", "{{ message['content'] + eos_token }}"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if "generation %}" not in settings["chat_template"]:
        assert before in settings["chat_template"]
        after = f"{{% generation %}}{before}{{% endgeneration %}}"
        settings["chat_template"] = settings["chat_template"].replace(before, after)
    path.write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
    return str(folder)


def items(sentences: Sequence[str]) -> str:
    """Instruction data: which sign a sentence ends with."""
    kinds = [
        {"instruction": "这句话用什么结尾？", "input": sentence, "output": f"用{sentence[-1]}"}
        for sentence in sentences
    ]
    return json.dumps(kinds, ensure_ascii=False)
