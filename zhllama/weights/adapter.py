"""A LoRA adapter as peft stores it, and what it does to a tensor of the base model.

W += (alpha/r) · B·A, the product in float32, the sum rounded to the base's dtype: peft's merge_and_unload to the bit. A
tensor in modules_to_save (or saved beside its update) replaces the base's first; trained token rows replace those rows.
All of it is done for some rows at a time. Settings that mean another arithmetic (DoRA, biases …) are refused by name.
"""

import math
import re
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from zhllama.artifacts.json_file import read_object
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.weights.safetensors_io import Checkpoint
from zhllama.weights.torch_zip import PthFile, is_zip, load_tensors

if TYPE_CHECKING:
    import torch


CONFIG = "adapter_config.json"
SAFE = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"

_PREFIX = "base_model.model."
_KEY = re.compile(
    r"(?P<module>.+?)\.(?:(?P<part>lora_(?:embedding_)?[AB])(?:\.default)?(?:\.weight)?"
    r"|token_adapter\.(?P<rows>trainable_tokens_delta)(?:\.default)?"
    r"|(?:modules_to_save\.(?:default\.)?|base_layer\.|token_adapter\.base_layer\.)?(?P<saved>weight))"
)
_IGNORED = re.compile(r"rotary_emb\.inv_freq$|\.original_module\.weight$")
"""Rotary frequencies, which old versions saved, and the base's own embedding, which peft saves after a resize."""
_REFUSED = {
    "use_dora": "DoRA",
    "lora_bias": "biases",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "layer_replication": "replicated layers",
    "target_parameters": "target_parameters",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
"""Fields of adapter_config.json that, when set, mean another arithmetic than W + scale·B·A."""


class Update(NamedTuple):
    """W += scale · B·A, the two factors by key. Linear: A (r, in), B (out, r). Embedding: A (r, rows), B (dim, r)."""

    a: str
    b: str
    embedding: bool
    transposed: bool
    scale: float
    """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""
    shape: tuple[int, ...]
    """Of the base's tensor."""


class Adapter:
    """One adapter: its settings checked, its tensors known by name and shape, read when asked for. By the model's
    tensors: `updates`; `replaced`, the key of what comes in its place; `tokens`, the key of trained rows (n, width),
    and which n rows they replace. `stored`: key → what has the `shape` of an adapter's tensor."""

    def __init__(self, artifact: Artifact, option: str) -> None:
        self.artifact = artifact
        self.where = where = f"{option} {artifact.root}"
        if CONFIG not in artifact:
            raise InputError(f"{where}: no {CONFIG} in it; give a peft adapter's folder")
        try:
            self.config = read_object(artifact, CONFIG)
            self._rank, self._alpha = int(self.config["r"]), float(self.config["lora_alpha"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{where}: {CONFIG} is no LoRA configuration ({error}); fetch it again") from error
        if str(self.config.get("peft_type", "LORA")).upper() != "LORA":
            raise InputError(f"{where}: a {self.config['peft_type']} adapter; only LoRA can be merged here")
        refused = [f"{name} ({meaning})" for name, meaning in _REFUSED.items() if self.config.get(name)]
        if (bias := self.config.get("bias", "none")) != "none":
            refused.append(f"bias={bias!r}")
        if refused:
            raise InputError(f"{where}: {CONFIG} sets {refused[0]}; merge this adapter with peft")
        file = _opened(artifact, option)
        self.stored: dict[str, Any] = file.tensors
        self.read = file.read
        """A tensor or rows of it, as Checkpoint.read."""
        self.replaced: dict[str, str] = {}
        self.tokens: dict[str, tuple[str, Sequence[int]]] = {}
        factors: dict[str, dict[str, str]] = {}
        for key in self.stored:
            if _IGNORED.search(key):
                continue
            found = _KEY.fullmatch(key.removeprefix(_PREFIX))
            if found is None:
                raise InputError(f"{where}: tensor {key} is neither a LoRA factor nor a saved module")
            weight = f"{found['module']}.weight"
            if found["saved"]:
                self.replaced[weight] = key
            elif found["rows"]:
                self.tokens[weight] = key, self._token_rows(found["module"])
            else:
                factors.setdefault(weight, {})[found["part"]] = key
        self.updates = {weight: self._update(weight, parts) for weight, parts in factors.items()}
        self.touched = {*self.replaced, *self.updates, *self.tokens}
        """The tensors of the model that this adapter changes."""
        if not self.touched:
            raise InputError(f"{where}: no tensor in the adapter; it was saved empty, train or fetch it again")

    def _token_rows(self, module: str) -> Sequence[int]:
        """The rows that trainable_token_indices name for a module: one list for the embedding, or one by module."""
        named = self.config.get("trainable_token_indices") or []
        if isinstance(named, dict):
            named = next((rows for name, rows in named.items() if f".{module}".endswith(f".{name}")), [])
        if not named or not all(isinstance(row, int) and row >= 0 for row in named):
            raise InputError(
                f"{self.where}: {CONFIG} does not name the trained rows of {module} (trainable_token_indices); it "
                "belongs to another adapter"
            )
        return [int(row) for row in named]

    def _update(self, weight: str, parts: dict[str, str]) -> Update:
        """InputError for factors that are not two, or contradict the rank."""
        embedding = "lora_A" not in parts and "lora_B" not in parts
        kind = "lora_embedding_" if embedding else "lora_"
        if f"{kind}A" not in parts or f"{kind}B" not in parts:
            raise InputError(f"{self.where}: {weight} has one of its two LoRA factors; the adapter is cut short")
        rank = int(self._setting("rank_pattern", weight, self._rank))
        alpha = self._setting("alpha_pattern", weight, self._alpha)
        a, b = (self.stored[parts[f"{kind}{which}"]].shape for which in "AB")
        if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
            raise InputError(
                f"{self.where}: {weight} has factors {a} and {b} where rank {rank} is configured; {CONFIG} belongs to "
                "another adapter"
            )
        transposed = embedding or bool(self.config.get("fan_in_fan_out"))
        scale = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        shape = (a[1], b[0]) if transposed else (b[0], a[1])
        return Update(parts[f"{kind}A"], parts[f"{kind}B"], embedding, transposed, scale, shape)

    def _setting(self, pattern: str, weight: str, default: float) -> float:
        """The rank or alpha of a module: the first pattern that matches the end of its name, else the default."""
        module = weight.removesuffix(".weight")
        given = (self.config.get(pattern) or {}).items()
        return next((float(value) for key, value in given if re.match(rf"(.*\.)?({key})$", module)), default)


class Change:
    """One adapter's change of one tensor, to be applied to any of its rows, from any thread."""

    def __init__(self, adapter: Adapter, name: str) -> None:
        self.adapter, self._update = adapter, adapter.updates.get(name)
        self.replaced, self._tokens = adapter.replaced.get(name), adapter.tokens.get(name)
        self._factors: tuple[torch.Tensor, torch.Tensor] | None = None
        self._reading = threading.Lock()

    def brings(self, first: int) -> bool:
        """Whether row `first` comes in the place of the model's."""
        return self.replaced is not None and first < self.adapter.stored[self.replaced].shape[0]

    def apply(self, first: int, rows: "torch.Tensor", values: "torch.Tensor", product: "torch.Tensor") -> None:
        """Changes the rows from `first` on in their place, in the model's dtype. values: the same rows in float32.
        product: room for as many elements in float32."""
        if self._update is not None:
            self._add_product(self._update, first, rows, values, product)
        if self._tokens is not None:
            key, tokens = self._tokens
            places = [(place, row - first) for place, row in enumerate(tokens) if first <= row < first + rows.shape[0]]
            if places:
                lowest, highest = places[0][0], places[-1][0]
                trained = self.adapter.read(key, lowest, highest + 1 - lowest).to(rows.dtype)
                rows[[row for _, row in places]] = trained[[place - lowest for place, _ in places]]

    def _add_product(
        self, update: Update, first: int, rows: "torch.Tensor", values: "torch.Tensor", product: "torch.Tensor"
    ) -> None:
        import torch

        with self._reading:
            if self._factors is None:
                self._factors = self.adapter.read(update.a).float(), self.adapter.read(update.b).float()
        (a, b), end = self._factors, first + rows.shape[0]
        if update.embedding:
            # peft rounds the update of an embedding before it adds it, unlike every other
            rows.add_(((b @ a[:, first:end]).T * update.scale).to(rows.dtype))
            return
        if update.transposed:
            product = torch.mm(b, a[:, first:end], out=product.view(b.shape[0], end - first)).T
        else:
            torch.mm(b[first:end], a, out=product)
        # in float32, and rounded once to the model's dtype
        if update.scale >= 1 and math.frexp(update.scale)[0] == 0.5:
            # a power of two scales exactly: adding at once has the bits of two steps
            rows.copy_(torch.add(values, product, alpha=update.scale, out=product))
        else:
            rows.copy_(product.mul_(update.scale).add_(values))


def _opened(artifact: Artifact, option: str) -> Any:
    """What its tensors are read from by name, as from a Checkpoint."""
    if SAFE in artifact:
        return Checkpoint(artifact, option, single=SAFE)
    if PICKLE not in artifact:
        where = f"{option} {artifact.root}"
        raise InputError(f"{where}: neither {SAFE} nor {PICKLE} in it; publish or fetch the adapter again")
    if is_zip(artifact, PICKLE):
        return PthFile(artifact, PICKLE)
    # torch's format before 1.6 is read whole
    with artifact.open(PICKLE) as stream:
        held = load_tensors(stream, f"{artifact.root}/{PICKLE}")
    return SimpleNamespace(
        tensors=held, read=lambda key, first=0, count=None, room=None: held[key][first:][:count].clone()
    )
