"""A LoRA adapter as peft stores it, and what it does to a tensor of the base model.

W += (alpha/r) · B·A, the product in float32, the sum rounded to the base's dtype: peft's merge_and_unload to the bit. A
tensor in modules_to_save (or saved beside its update) replaces the base's first; trained token rows replace those rows.
With a `scale` that is not 1, W + scale · (what W would become − W): half of what was trained, say; of LoRA that is
peft's scale_layer. All of it is done for some rows at a time. One reader for whoever merges, asks or trains
on: peft's own loader takes no notice of names that it does not know, and the model answers as if there were no adapter.
"""

import logging
import math
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.models.architecture import EMBEDDING, HEAD
from zhllama.weights.adapter_config import CONFIG, AdapterConfig
from zhllama.weights.safetensors_io import Checkpoint
from zhllama.weights.torch_zip import PthFile, is_zip, load_tensors

if TYPE_CHECKING:
    import torch

    from zhllama.weights.tensors import Room

log = logging.getLogger("adapter")

SAFE = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"

Shape = tuple[int, ...]
_PREFIX = "base_model.model."
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts of a name that torch puts anywhere into it when it compiles, shards or recomputes a module."""
_OUTSIDE = {"state_dict", "module", "model", "_forward_module"}
"""Parts before _PREFIX: of a dictionary, of DDP and DeepSpeed, of Lightning. All but `model` without it as well."""
_KEY = re.compile(
    r"(?P<module>.+?)\.(?:(?P<part>lora_(?:embedding_)?[AB])(?:\.(?!(?:weight|bias)$)(?P<name>[^.]+))?(?:\.weight)?"
    r"|token_adapter\.(?P<rows>trainable_tokens_delta)(?:\.(?P<rows_name>[^.]+))?"
    r"|(?:modules_to_save\.(?:(?!weight$)(?P<saved_name>[^.]+)\.)?|base_layer\.|token_adapter\.base_layer\.)?"
    r"(?P<saved>weight))"
)
_IGNORED = re.compile(r"rotary_emb\.inv_freq$|\.original_module\.weight$")
"""Rotary frequencies, which old versions saved, and the base's own embedding, which peft saves after a resize."""


class Update(NamedTuple):
    """W += scale · B·A, the two factors by key. Linear: A (r, in), B (out, r). Embedding: A (r, rows), B (dim, r)."""

    a: str
    b: str
    embedding: bool
    scale: float
    """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA, times the adapter's own."""
    shape: tuple[int, ...]
    """Of the base's tensor."""


class Adapter:
    """One adapter: its settings checked, its tensors known by name and shape, read when asked for. By the model's
    tensors: `updates`; `replaced`, the key of what comes in its place; `tokens`, the key of trained rows (n, width),
    and which n rows they replace. `stored`: key → what has the `shape` of an adapter's tensor."""

    def __init__(self, artifact: Artifact, option: str, scale: float = 1.0) -> None:
        self.artifact, self.scale = artifact, scale
        self.config = AdapterConfig(artifact, option)
        self.where = self.config.where
        file = _opened(artifact, option)
        self.stored: dict[str, Any] = file.tensors
        self.read = file.read
        """A tensor or rows of it, as Checkpoint.read."""
        self.replaced: dict[str, str] = {}
        self.tokens: dict[str, tuple[str, Sequence[int]]] = {}
        factors: dict[str, dict[str, str]] = {}
        names = set()
        for key in self.stored:
            if _IGNORED.search(key):
                continue
            found = _KEY.fullmatch(_unwrapped(key))
            if found is None:
                raise InputError(f"{self.where}: tensor {key} is neither a LoRA factor nor a saved module")
            weight = f"{found['module']}.weight"
            if found["saved"]:
                known, kind = self.replaced, weight
                pair = {_unwrapped(key), _unwrapped(known.get(weight, ""))}
                if pair == {weight, f"{found['module']}.modules_to_save.weight"}:
                    # peft saves both after a resize, and reads the plain one
                    known[weight] = min(key, known[weight], key=len)
                    continue
                self.replaced.setdefault(weight, key)
            elif found["rows"]:
                known, kind = {name: each for name, (each, _) in self.tokens.items()}, weight
                self.tokens.setdefault(weight, (key, self._token_rows(found["module"])))
            else:
                known, kind = factors.setdefault(weight, {}), found["part"]
                known.setdefault(kind, key)
            if known.get(kind, key) != key:
                raise InputError(f"{self.where}: {known[kind]} and {key} are the same tensor; give one adapter")
            names.add(found["name"] or found["rows_name"] or found["saved_name"])
            self._check(key)
        if len(several := names - {None}) > 1:
            raise InputError(f"{self.where}: it holds {len(several)} adapters ({', '.join(sorted(several))}); give one")
        self.updates = {weight: self._update(weight, parts) for weight, parts in factors.items()}
        self.touched = {*self.replaced, *self.updates, *self.tokens}
        """The tensors of the model that this adapter changes."""
        if not self.touched:
            raise InputError(f"{self.where}: no tensor in the adapter; it was saved empty, train or fetch it again")

    def peft_keys(self) -> Iterator[tuple[str, str]]:
        """Every tensor that counts: the name that peft gives it, and its key here."""
        for weight, update in self.updates.items():
            kind, end = ("lora_embedding_", "") if update.embedding else ("lora_", ".weight")
            for part, key in (("A", update.a), ("B", update.b)):
                yield f"{_PREFIX}{weight.removesuffix('weight')}{kind}{part}{end}", key
        for weight, key in self.replaced.items():
            beside = weight in self.updates or weight in self.tokens
            yield f"{_PREFIX}{weight.removesuffix('weight')}{'base_layer.' if beside else ''}weight", key
        for weight, (key, _) in self.tokens.items():
            yield f"{_PREFIX}{weight.removesuffix('weight')}token_adapter.trainable_tokens_delta", key

    def fitted(self, shapes: Mapping[str, Shape], model: str, pieces: int | None) -> dict[str, Shape]:
        """The shape of every tensor of a model after this adapter, from those before. InputError for a target that the
        model has not, or of another size, and for one that the adapter should change and does not. pieces: of the
        adapter's own vocabulary, which may bring rows."""
        if self.config.base:
            log.info("%s: it says that it was trained on %s; it is given to %s", self.where, self.config.base, model)
        after = dict(shapes)
        for name in sorted(self.touched):
            if name not in shapes:
                said = f"it changes {name}, which {model} does not have"
                raise InputError(f"{self.where}: {said}; give the model that it was trained on")
        for name, key in self.replaced.items():
            brought = tuple(self.stored[key].shape)
            grown = name in (EMBEDDING, HEAD) and pieces is not None and pieces <= brought[0]
            if brought != shapes[name] and not (grown and brought[1:] == shapes[name][1:]):
                raise self.other_size(name, brought, shapes[name])
            after[name] = brought
        for name, update in self.updates.items():
            if update.shape != after[name]:
                raise self.other_size(name, update.shape, after[name])
        for name, (key, tokens) in self.tokens.items():
            brought, wanted = tuple(self.stored[key].shape), (len(tokens), *after[name][1:])
            if brought != wanted:
                raise self.other_size(f"the trained rows of {name}", brought, wanted)
            if max(tokens) >= after[name][0]:
                raise InputError(
                    f"{self.where}: it trained row {max(tokens)} of {name}, which has {after[name][0]} rows; give the "
                    "model that it was trained on (with its vocabulary extended)"
                )
        if HEAD in after and after.get(EMBEDDING) != after[HEAD]:
            raise self.other_size(HEAD, after[HEAD], after[EMBEDDING])
        self._require_whole(shapes)
        return after

    def _require_whole(self, shapes: Mapping[str, Shape]) -> None:
        """InputError when the configuration names layers of the model of which the adapter has no tensor, or the
        adapter has factors for layers that the configuration does not name (peft would leave them out, unsaid)."""
        lost, strange = [], []
        for name, shape in shapes.items():
            module = name.removesuffix(".weight")
            if len(shape) == 2 and self.config.targets:
                named = self.config.targeted(module)
                lost += [name] if named and name not in self.updates else []
                strange += [name] if not named and name in self.updates else []
            saved, rows = self.config.saves(module), self.config.rows_of(module)
            if (saved and name not in self.replaced) or (rows and not saved and name not in self.tokens):
                lost.append(name)
        if lost:
            raise InputError(
                f"{self.where}: {CONFIG} names {lost[0]}, and the adapter has no tensor of it ({len(lost)} such); it "
                "was cut short, save or fetch it again"
            )
        if strange:
            raise InputError(
                f"{self.where}: it has factors of {strange[0]}, which {CONFIG} does not name among its target_modules; "
                "it belongs to another adapter"
            )

    def other_size(self, name: str, has: Shape, wanted: Shape) -> InputError:
        return InputError(
            f"{self.where}: {name} is {has} in the adapter and {wanted} in the model; give the model that it was "
            "trained on (the same size, the same vocabulary)"
        )

    def _token_rows(self, module: str) -> Sequence[int]:
        """The rows that trainable_token_indices name for a module."""
        if not (rows := self.config.rows_of(module)):
            raise InputError(
                f"{self.where}: {CONFIG} does not name the trained rows of {module} (trainable_token_indices); it "
                "belongs to another adapter"
            )
        return rows

    def _check(self, key: str) -> None:
        """InputError for a tensor that is none of rows of numbers."""
        stored = self.stored[key]
        kind = str(stored.dtype).removeprefix("torch.")
        if not stored.shape:
            raise InputError(f"{self.where}: tensor {key} is a single number; the adapter is damaged, fetch it again")
        if not kind.startswith(("float", "bfloat")):
            raise InputError(f"{self.where}: tensor {key} is {kind}; give the adapter in float16, bfloat16 or float32")

    def _update(self, weight: str, parts: dict[str, str]) -> Update:
        """InputError for factors that are not two, or contradict the rank."""
        embedding = "lora_A" not in parts and "lora_B" not in parts
        kind = "lora_embedding_" if embedding else "lora_"
        if f"{kind}A" not in parts or f"{kind}B" not in parts or len(parts) > 2:
            raise InputError(f"{self.where}: {weight} has one of its two LoRA factors; the adapter is cut short")
        module = weight.removesuffix(".weight")
        rank = self.config.rank_of(module)
        a, b = (tuple(self.stored[parts[f"{kind}{which}"]].shape) for which in "AB")
        if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
            raise InputError(
                f"{self.where}: {weight} has factors {a} and {b} where rank {rank} is configured; {CONFIG} belongs to "
                "another adapter"
            )
        shape = (a[1], b[0]) if embedding else (b[0], a[1])
        return Update(parts[f"{kind}A"], parts[f"{kind}B"], embedding, self.config.scale_of(module) * self.scale, shape)


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

    def brought(self, first: int, count: int, room: "Room | None" = None) -> "torch.Tensor | None":
        """The rows that come in the place of these; as Checkpoint.read."""
        return self.adapter.read(self.replaced, first, count, room) if self.brings(first) else None

    def apply(
        self,
        first: int,
        rows: "torch.Tensor",
        values: "torch.Tensor",
        product: "torch.Tensor",
        brought: "torch.Tensor | None" = None,
    ) -> None:
        """Changes the rows from `first` on in their place, in the model's dtype. values: the same rows in float32.
        product: room for as many elements in float32. brought: what an adapter with a scale has in their place; without
        one, `rows` are that already."""
        before = values
        if brought is not None:
            values = towards(before, brought, self.adapter.scale)
            rows.copy_(values)
        if self._update is not None:
            self._add_product(self._update, first, rows, values, product)
        if self._tokens is not None:
            key, tokens = self._tokens
            places = [(place, row - first) for place, row in enumerate(tokens) if first <= row < first + rows.shape[0]]
            if places:
                lowest, highest = places[0][0], places[-1][0]
                trained = self.adapter.read(key, lowest, highest + 1 - lowest)[[place - lowest for place, _ in places]]
                at = [row for _, row in places]
                if self.adapter.scale != 1:
                    trained = towards(before[at], trained, self.adapter.scale)
                rows[at] = trained.to(rows.dtype)

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
        torch.mm(b[first:end], a, out=product)
        # in float32, and rounded once to the model's dtype
        if update.scale >= 1 and math.frexp(update.scale)[0] == 0.5:
            # a power of two scales exactly: adding at once has the bits of two steps
            rows.copy_(torch.add(values, product, alpha=update.scale, out=product))
        else:
            rows.copy_(product.mul_(update.scale).add_(values))


def towards(before: "torch.Tensor", trained: "torch.Tensor", scale: float) -> "torch.Tensor":
    """before + scale · (trained − before), computed in float32."""
    return (trained.float() - before).mul_(scale).add_(before)


def _unwrapped(key: str) -> str:
    """A tensor's name without what trainers and torch put around or into it."""
    name = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
    before, prefix, after = name.rpartition(_PREFIX)
    if prefix and set(before.split(".")) <= {*_OUTSIDE, "base_model", ""}:
        return after
    while name.partition(".")[0] in _OUTSIDE - {"model"}:
        name = name.partition(".")[2]
    return name


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
