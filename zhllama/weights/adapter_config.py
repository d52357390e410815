"""adapter_config.json: what it asks for, setting by setting.

What W + scale·B·A follows is read here; what says how an adapter was begun, trained or found is harmless. Whatever else
is set means another arithmetic, or one that nobody here knows, and is refused by its name: peft adds settings with
every release, and each of them passed as long as the known bad ones were listed.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

from zhllama.artifacts.json_file import read_object
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.weights.name_pattern import whole_match

CONFIG = "adapter_config.json"
_END = r"(.*\.)?({})$"
"""How peft reads a pattern of a rank or an alpha."""
_MOST_PATTERNS = 20_000
_SECONDS = 10.0
"""Of the processor, for all patterns of a configuration: those of 80 layers take a tenth of one."""

_DONE = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "trainable_token_indices", "bias",
    "init_lora_weights", "ensure_weight_tying", "base_model_name_or_path",
}  # fmt: skip
_HARMLESS = {
    "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "merge_weights", "megatron_core",
    "runtime_config", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "fan_in_fan_out", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr",
}  # fmt: skip
"""Of fan_in_fan_out peft says so itself, for the layers that LLaMA has. The settings of ways to begin matter where
init_lora_weights names one that changes the base."""
_BEGUN = {"true", "false", "none", "gaussian", "orthogonal", "eva", "mica"}
"""Of init_lora_weights: the base stays as it is. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change it, and peft changes it
again when it loads such an adapter."""
_MEANINGS = {
    "use_dora": "DoRA",
    "lora_bias": "biases",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
}


class AdapterConfig:
    """Of a LoRA adapter. `rank` and `alpha` hold where no pattern names a module; `targets`: as peft reads it, names or
    one expression; `saved`: the modules that are saved whole; `token_rows`: rows that are trained alone, by
    module; `keeps_tied`: a tied model stays so. InputError for what is not done here."""

    def __init__(self, artifact: Artifact, option: str) -> None:
        self.where = f"{option} {artifact.root}"
        if CONFIG not in artifact:
            raise InputError(f"{self.where}: no {CONFIG} in it; give a peft adapter's folder")
        try:
            self._read(read_object(artifact, CONFIG))
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            said = f"it has no {error.args[0]}" if isinstance(error, KeyError) else error
            raise InputError(f"{self.where}: {CONFIG} is no LoRA configuration ({said}); fetch it again") from error

    def _read(self, given: Mapping[str, Any]) -> None:
        kind = str(given.get("peft_type") or "LORA")[:80]
        if kind.upper() != "LORA":
            raise InputError(f"{self.where}: a {kind} adapter; only LoRA can be merged, trained or asked here")
        self._refuse(given)
        self.rank, self.alpha = _whole(given["r"], "r"), _number(given["lora_alpha"], "lora_alpha")
        self.dropout = _number(given.get("lora_dropout") or 0.0, "lora_dropout")
        if self.dropout > 1:
            raise ValueError(f"lora_dropout is {self.dropout:g}, where a share of 1 is needed")
        self.rank_stabilised, self.keeps_tied = _flag(given, "use_rslora"), _flag(given, "ensure_weight_tying")
        self.ranks = {name: _whole(rank, name) for name, rank in _object(given, "rank_pattern").items()}
        self.alphas = {name: _number(alpha, name) for name, alpha in _object(given, "alpha_pattern").items()}
        if not self.alpha and not any(self.alphas.values()):
            raise ValueError("lora_alpha is 0: it changes nothing")
        self.targets, self.excluded = _names(given, "target_modules"), _names(given, "exclude_modules")
        self.saved = _names(given, "modules_to_save") or []
        if isinstance(self.saved, str):
            raise ValueError("modules_to_save is no list")
        self.layers, self._layer_lists = _layers(given), _names(given, "layers_pattern") or []
        if self.layers is not None and isinstance(self.targets, str):
            raise ValueError("layers_to_transform beside an expression for target_modules, which peft does not take")
        self.token_rows = _token_rows(given)
        base = given.get("base_model_name_or_path")
        self.base = base if isinstance(base, str) else ""
        if len(self.ranks) + len(self.alphas) > _MOST_PATTERNS:
            raise ValueError(f"it has {len(self.ranks) + len(self.alphas):,} patterns")
        matching = partial(whole_match, left=[_SECONDS], where=f"{self.where}: {CONFIG}")
        self._rank_of = [(matching(_END.format(name)), rank) for name, rank in self.ranks.items()]
        self._alpha_of = [(matching(_END.format(name)), alpha) for name, alpha in self.alphas.items()]
        self._targeted, self._left_out = (
            matching(names) if isinstance(names, str) else _one_of(names or ())
            for names in (self.targets, self.excluded)
        )

    def _refuse(self, given: Mapping[str, Any]) -> None:
        for name, value in given.items():
            said = f" ({_MEANINGS[name]})" if name in _MEANINGS else ""
            if name == "bias":
                refused, said = value not in ("none", None), f"={value!r}"
            elif name == "init_lora_weights":
                refused, said = str(value).lower() not in _BEGUN, f"={value!r} (it changes the base's weights)"
            else:
                unset = value is None or value is False or value in ("", [], {})
                refused = not unset and name not in _DONE | _HARMLESS
            if refused:
                raise InputError(
                    f"{self.where}: {CONFIG} sets {name[:80]}{said[:120]}, which is not done here; merge this adapter "
                    "with peft"
                )

    def for_peft(self) -> dict[str, Any]:
        """The arguments of a LoraConfig, those that say something."""
        given = {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rank_stabilised,
            "rank_pattern": self.ranks,
            "alpha_pattern": self.alphas,
            "target_modules": self.targets,
            "exclude_modules": self.excluded,
            "layers_to_transform": sorted(self.layers or ()),
            "layers_pattern": self._layer_lists if self.layers is not None else None,
            "modules_to_save": self.saved,
            "trainable_token_indices": self.token_rows,
            "ensure_weight_tying": self.keeps_tied,
            "task_type": "CAUSAL_LM",
        }
        return {name: value for name, value in given.items() if value or name == "lora_alpha"}

    def rank_of(self, module: str) -> int:
        """The first pattern that matches the end of its name decides, as in peft."""
        return next((rank for matches, rank in self._rank_of if matches(module)), self.rank)

    def alpha_of(self, module: str) -> float:
        return next((alpha for matches, alpha in self._alpha_of if matches(module)), self.alpha)

    def scale_of(self, module: str) -> float:
        """Of B·A: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.rank_stabilised else rank)

    def targeted(self, module: str) -> bool:
        """Whether peft would put factors beside this layer of a model (a matrix)."""
        if self._left_out(module) or self.saves(module):
            return False
        if self.targets == "all-linear":
            return module.rpartition(".")[2] not in ("embed_tokens", "lm_head")
        return self._targeted(module) and (self.layers is None or _layer_of(module, self._layer_lists) in self.layers)

    def saves(self, module: str) -> bool:
        """Whether it is, or lies in, a module that is saved whole."""
        return any(f".{name}." in f".{module}." for name in self.saved)

    def rows_of(self, module: str) -> list[int]:
        """The rows of a module that are trained alone."""
        return next((rows for name, rows in self.token_rows.items() if _ends(module, name)), [])


def _ends(module: str, name: str) -> bool:
    return f".{module}".endswith(f".{name}")


def _one_of(names: Collection[str]) -> Callable[[str], bool]:
    chosen = set(names)
    # every ending of the module's name that begins after a dot
    return lambda module: any(module.split(".", cut)[cut] in chosen for cut in range(module.count(".") + 1))


def _layer_of(module: str, lists: Iterable[str]) -> int | None:
    """The number that peft takes for a module's layer: the first one, or that after the name of a list of layers."""
    parts = module.split(".")
    for before, part in pairwise(parts):
        if part.isdecimal() and (not lists or before in lists):
            return int(part)
    return None


def _whole(value: Any, name: str) -> int:
    if type(value) not in (int, float) or value != int(value) or not 1 <= value < 2**31:
        raise ValueError(f"{name[:80]} is {str(value)[:40]}, where a rank of 1 or more is needed")
    return int(value)


def _number(value: Any, name: str) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{name[:80]} is {str(value)[:40]}, where a number is needed")
    return float(value)


def _flag(given: Mapping[str, Any], name: str) -> bool:
    if (value := given.get(name)) not in (None, True, False):
        raise ValueError(f"{name} is {str(value)[:40]}, where true or false is needed")
    return bool(value)


def _object(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(value := given.get(name) or {}, dict):
        raise ValueError(f"{name} is no object")
    return value


def _names(given: Mapping[str, Any], name: str) -> list[str] | str | None:
    value = given.get(name)
    if not value or isinstance(value, str):
        return value or None
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ValueError(f"{name} is no list of names")
    return sorted(value)


def _layers(given: Mapping[str, Any]) -> set[int] | None:
    value = given.get("layers_to_transform")
    many = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(one) is int for one in many):
        raise ValueError("layers_to_transform is no list of layers")
    return set(many) or None


def _token_rows(given: Mapping[str, Any]) -> dict[str, list[int]]:
    value = given.get("trainable_token_indices") or {}
    # one list is of the embedding
    by_module = value if isinstance(value, dict) else {"embed_tokens": value}
    for rows in by_module.values():
        if not isinstance(rows, list) or not all(type(row) is int and row >= 0 for row in rows):
            raise ValueError("trainable_token_indices are no rows")
    return by_module
