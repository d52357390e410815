"""The configuration of a run: the size's file, over it a team's files, over them `--set`; typed, checked, and what
follows from it. All that decides the shape of a pipeline is decided here, before anything is compiled.

An address that is given implies where the run starts (`--set model=X`: start=model). What a later layer says stands
over what an earlier one implies; two words of one layer that cannot both hold are refused.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pipelines import sizes
from pipelines.local.placeholders import Value, value_of
from pipelines.settings import MACHINE, SETTINGS, TRAININGS, Setting, of_all
from pipelines.shape import Shape, shape_of
from pipelines.sizes import SIZED, Size
from zhllama import storage
from zhllama.errors import InputError
from zhllama.kubernetes.pod_settings import pod_settings
from zhllama.kubernetes.pods import uid
from zhllama.stage.command_line import nearest
from zhllama.stage.requirements import check_requirements, parse_requirements

_STARTS = (("adapters", "adapters"), ("extended_model", "extended"), ("model", "model"), ("weights", "weights"))
"""Address → the start that it implies; the first that is given decides."""
KFP_KINDS = {
    str: "STRING", int: "NUMBER_INTEGER", float: "NUMBER_DOUBLE", bool: "BOOLEAN", dict: "STRUCT", list: "LIST"
}  # fmt: skip
_A = {**sizes.WORDS, dict: "a mapping", list: "a list"}
_NESTED = (("work_", ""), ("adapter_", "lora_"), ("serving_", "serve_"))
"""A team's file may be written as a size's file is: `lora: {memory: 64Gi}` is lora_memory, `work: {data: …}` data_…"""
WORDS_OF_INSTRUCTIONS = ("given", "import", "generate", "none")
_MEASURED = {
    "text": "give text", "english": "give english_text", "instructions": "give instructions",
    "choices": "give instructions that have few answers each", "questions": "set questions, to 200",
}  # fmt: skip
"""What figures are measured on → how to come by it."""


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """What a pipeline is compiled from."""

    size: Size
    """With everything that was set put over it."""
    shape: Shape
    values: Mapping[str, Value]
    """Every setting, its default where nothing was said."""
    defaults: Mapping[str, Value]
    """What is written into the compiled pipeline as the defaults of its parameters."""
    arguments: Mapping[str, str]
    """What --set says of the compiled pipeline's parameters, as texts; not what this course does not read."""
    reasons: Mapping[str, str]
    """Of `start`, `tokenizer` and the like: what decided it, as `start=model, by --set model`."""
    given: frozenset[str]
    """The settings that somebody said something about."""

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def reason(self, name: str) -> str:
        """Why a step is there: what was decided, and by what."""
        of = {"run_embeddings": "run_stage1", "run_lora": "run_pretraining"}.get(name, name)
        value = getattr(self.shape, of) if of in ("instructions", "replay") else self[of]
        shown = str(value).lower() if isinstance(value, bool) else value
        return f"{of}={shown}, by {self.reasons.get(of, 'default')}"

    def machine(self, training: str) -> dict[str, Any]:
        """What launch_training is told of a training's machines: the training's own setting, else the one for all."""
        own = {option: self[f"{training}_{option}"] for option in MACHINE}
        return {option: self[of_all(option)] if value is None else value for option, value in own.items()}

    def parameters(self) -> Iterator[tuple[Setting, Value, bool]]:
        """The parameters of the compiled pipeline: setting, default, whether it has to be given."""
        needed = self.shape.reads()
        for setting in SETTINGS.values():
            if not setting.compiled and _is_read(setting, self.shape, needed):
                default = self.defaults[setting.name]
                required = default is None or (needed.get(setting.name, False) and not default)
                yield setting, default, required


def _is_read(setting: Setting, shape: Shape, addresses: Mapping[str, bool]) -> bool:
    name = setting.name
    if setting.address:
        return name in addresses
    family = name.partition("_")[0]
    if family == "generate":
        return shape.instructions == "generate" or (shape.instructions == "import" and name == "generate_items")
    if family in TRAININGS:
        return {"embeddings": shape.stage1, "lora": shape.stage2, "sft": shape.sft}[family]
    if name == "vocab_size":
        return shape.extends and shape.tokenizer != "given"
    if name == "replay_documents":
        return shape.replay == "own"
    if name in ("block_size", "validation_fraction"):
        return shape.stage2 or shape.instructions != "none"
    return True


# --- layers -----------------------------------------------------------------------------------------------------------
def configure(
    size: str,
    settings: Mapping[str, str] | None = None,
    files: Sequence[Path] = (),
    *,
    defaults: Mapping[str, Value] | None = None,
    write: bool = True,
) -> Configuration:
    """The configuration of a size under a team's files and `--set`. defaults: what a command itself wants where nobody
    says otherwise. write: whether the values that `--set` gives to parameters are written into the pipeline, as their
    defaults there; without it they are `arguments` of one run alone, and runs share one compiled pipeline.
    InputError names the setting, the file and the nearest right name."""
    plain, texts = sizes.load(size), dict(settings or {})
    layers = [
        ("", dict(defaults or {})),
        *((str(path), read_file(path)) for path in files),
        ("--set", {name: typed_value(name, text, f"--set {name}") for name, text in texts.items()}),
    ]
    chosen: dict[str, Value] = {}
    reasons: dict[str, str] = {}
    before: dict[str, Value] = {}
    by: dict[str, str] = {}
    for source, layer in layers:
        before = dict(chosen)
        by |= dict.fromkeys(layer, source)
        _imply(layer, source, reasons)
        chosen |= layer
    words = cast(str | None, chosen.get("instructions_from"))
    of, values = _resolved(plain, chosen)
    shape = shape_of(values, words)
    needed = shape.reads()
    if texts.get("instructions") in WORDS_OF_INSTRUCTIONS:
        del texts["instructions"]
    run = {name for name, setting in SETTINGS.items() if not setting.compiled and _is_read(setting, shape, needed)}
    made = Configuration(
        size=of, shape=shape, values=values, defaults=values if write else _resolved(plain, before)[1],
        arguments={name: text for name, text in texts.items() if name in run}, reasons=reasons, given=frozenset(by),
    )  # fmt: skip
    _refuse_contradictions(made, by, words)
    _refuse_unread(made, texts)
    if "require" in by:
        _refuse_unmeasured(made, f"{by['require']} require", later=write)
    return made


def read_file(path: Path) -> dict[str, Value]:
    """A team's file: names as `--set` takes them, or nested as in a size's file. InputError names file and field."""
    value = sizes.read_yaml(path, f"--config {path}")
    if not isinstance(value, Mapping):
        raise InputError(f"--config {path}: settings by name are needed, as `lora_steps: 3000`")
    found: dict[str, Value] = {}
    for name, one in _flat(value, str(path), ""):
        if name in found:
            raise InputError(f"--config {path}: {name} is there twice; keep one")
        found[name] = typed_value(name, one, f"--config {path}: {name}")
    return found


def _flat(value: Mapping[Any, Any], where: str, before: str) -> Iterator[tuple[str, Any]]:
    for key, one in value.items():
        name = f"{before}{key}"
        for nested, flat in _NESTED:
            name = flat + name.removeprefix(nested) if name.startswith(nested) and before else name
        if isinstance(one, Mapping) and name not in SETTINGS:
            yield from _flat(one, where, f"{before}{key}_")
        elif name in SETTINGS or before:
            yield name, one
        else:
            raise InputError(f"--config {where}: there is no setting {name}{nearest(name, SETTINGS)}")


def typed_value(name: str, value: Any, where: str) -> Value:
    """A value as its setting has it. InputError for an unknown name, a wrong type or a choice that there is not."""
    if name not in SETTINGS:
        wrong = f"the pipeline has no such parameter{nearest(name, SETTINGS)}; see zhllama parameters"
        raise InputError(f"{where}: {wrong}")
    setting = SETTINGS[name]
    if re.search("[\0\ud800-\udfff]", str(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)):
        raise InputError(f"{where}: it is no text: it holds bytes that are not UTF-8, or a zero byte; write it anew")
    if isinstance(value, str) and setting.kind is not str:
        value = value_of(value, KFP_KINDS[setting.kind], where)
    elif isinstance(value, int | float) and not isinstance(value, bool) and setting.kind in (str, float):
        value = setting.kind(value)
    if not isinstance(value, setting.kind) or (isinstance(value, bool) and setting.kind is not bool):
        raise InputError(f"{where}: {value!r} where {_A[setting.kind]} is needed")
    if setting.choices and value not in setting.choices:
        near = nearest(str(value), setting.choices)
        raise InputError(f"{where}: {value!r}{near}; use {' or '.join(filter(None, setting.choices))}")
    checked: Any = value
    # what is written into pods, as the sizes' files are checked
    sizes.check_pod(name, checked, where)
    if setting.address or name == "store":
        check_addresses(checked, where)
    if name == "run_as_user":
        uid(checked, where)
    if name == "require":
        parse_requirements(checked, where)
    if name.endswith("_pods"):
        pod_settings(where, checked)
    return cast(Value, checked)


def check_addresses(text: str, where: str) -> None:
    """InputError for an address of a kind that nothing reads, and for a bucket that cannot be."""
    for part in text.split(","):
        # "hf:0.9" may be a folder with its weight
        kind = re.match(rf"([A-Za-z][A-Za-z0-9+.-]*):/|({'|'.join(_KINDS)}):(?![0-9.]+$)", part.strip())
        if kind and (kind[1] not in _KINDS or not part.strip().startswith(f"{kind[1]}://")):
            raise InputError(f"{where}: {part}: unknown kind of address; use s3://bucket/prefix, hf://name or a path")
        # shorter ones stand for a name, in examples; the store refuses them
        if kind and kind[1] == "s3" and len(storage.split_s3(part.strip())[0]) not in (1, 2):
            try:
                storage.normalise(part.strip())
            except InputError as error:
                raise InputError(f"{where}: {error}") from error


_KINDS = ("s3", "hf", "https", "http", "file")


# --- what follows -----------------------------------------------------------------------------------------------------
def _imply(layer: dict[str, Value], source: str, reasons: dict[str, str]) -> None:
    """Puts into a layer what its addresses say of the shape. InputError where the layer contradicts itself."""

    def imply(name: str, value: Value, by: str) -> None:
        layer[name] = value
        reasons[name.removesuffix("_from")] = f"{source} {by}"

    for name in ("start", "tokenizer", "run_pretraining", "run_stage1", "run_sft", "deploy", "check_merge", "replay"):
        if name in layer:
            reasons[name] = f"{source} {name}"
    starts = [(start, address) for address, start in _STARTS if layer.get(address)]
    if starts and "start" not in layer:
        imply("start", *starts[0])
    if "replay" not in layer and (text := [name for name in ("replay_text", "english_text") if layer.get(name)]):
        reasons["replay"] = f"{source} {text[0]}"
    if layer.get("chinese_tokenizer"):
        if (kind := layer.get("tokenizer", "given")) != "given":
            raise InputError(f"{source} tokenizer={kind}: chinese_tokenizer is given; leave one of them out")
        imply("tokenizer", "given", "chinese_tokenizer")
    said = layer.get("instructions")
    if said in WORDS_OF_INSTRUCTIONS:
        imply("instructions_from", layer.pop("instructions"), "instructions")
    elif said:
        imply("instructions_from", "given", "instructions")
    elif layer.get("import_instructions"):
        if layer.get("generate_base_url"):
            wrong = "an import asks no model; leave import_instructions out, or it"
            raise InputError(f"{source} generate_base_url: {wrong}")
        imply("instructions_from", "import", "import_instructions")
    elif by := [name for name in ("generate_base_url", "generate_items") if layer.get(name)]:
        imply("instructions_from", "generate", by[0])
    if layer.get("lora_adapter"):
        if layer.get("run_stage1") is True:
            raise InputError(f"{source} run_stage1=true: stage 1 is left out with lora_adapter; leave one of them out")
        imply("run_stage1", False, "lora_adapter")


def _refuse_contradictions(made: Configuration, by: Mapping[str, str], words: str | None) -> None:
    """InputError for two settings of one layer of which one leaves out what the other asks for. What a wider layer says
    beside a narrower one is a default, and left out in silence. by: setting → the layer that said it last."""
    values, shape = made.values, made.shape

    def refuse(name: str, shown: str, of: str, why: str) -> None:
        if by.get(of) and by.get(name) == by[of]:
            raise InputError(f"{by[of]} {name}{shown}: {why} leaves it out; leave one of them out")

    starts = made.reasons.get("start", "").rpartition(" ")[2]
    on = [name for name in ("run_pretraining", "run_stage1", "run_sft", "check_merge") if values[name] is True]
    asked = [(name, "=true") for name in on]
    if words in ("generate", "import") and made.reasons["instructions"].endswith(" instructions"):
        asked.append(("instructions", f"={words}"))
    if shape.start == "adapters":
        for name, shown in asked:
            refuse(name, shown, starts, "start=adapters" if starts == "start" else "a run from adapters")
    leave = {"run_pretraining": ("run_stage1", "check_merge"), "run_sft": ("check_merge", "instructions")}
    for of, names in leave.items():
        for name, shown in asked if values[of] is False else ():
            if name in names:
                refuse(name, shown, of, f"{of}=false")
    if values["tokenizer"] in ("given", "keep"):
        of, kind = made.reasons.get("tokenizer", "").rpartition(" ")[2], values["tokenizer"]
        refuse("vocab_size", "", of, f"tokenizer={kind}" if of == "tokenizer" else "chinese_tokenizer, which is given,")
    if shape.instructions == "given" and words == "given" and shape.sft:
        unused = [name for name in sorted(by) if name.startswith("generate_")]
        for name in (*unused, "import_instructions"):
            if values[name] != SETTINGS[name].default(made.size):
                refuse(name, "", "instructions", "a data set given as instructions")
    for name in ("replay_share", "forgetting_budget"):
        if shape.replay == "none" and values[name] != SETTINGS[name].default(made.size):
            trains = shape.stage2 or shape.sft
            mend = "give replay_text or english_text, or say replay=own" if trains else "nothing is trained"
            raise InputError(f"{by[name]} {name}: nothing is replayed ({made.reason('replay')}); {mend}")
    read = shape.reads()
    for address, _ in _STARTS if starts != "start" and values["base"] is None else ():
        # of --set, _refuse_unread says it
        if by.get(starts) != "--set" and values[address] and address not in read:
            refuse(address, "", starts, f"{made.reason('start')},")


def _refuse_unread(made: Configuration, told: Iterable[str]) -> None:
    """InputError for an address that --set names and this course does not read: it would be left out in silence."""
    shape = made.shape
    read = shape.reads()
    if "vocab_size" in told and shape.start in ("weights", "model") and shape.tokenizer == "keep":
        mend = "say --set tokenizer=continue (or train) as well"
        raise InputError(
            f"--set vocab_size: {made.size.name} keeps its vocabulary ({made.reason('tokenizer')}); {mend}"
        )
    for name in told:
        if SETTINGS[name].address and made.values[name] and name not in read:
            trainings = {"stage 1": shape.stage1, "stage 2": shape.stage2, "SFT": shape.sft}
            runs = ", ".join(training for training, there in trainings.items() if there) or "no training"
            raise InputError(
                f"--set {name}: a run with {made.reason('start')}, and {runs}, does not read it; leave it out, or say "
                "what the run starts from with --set start=…"
            )


def _refuse_unmeasured(made: Configuration, option: str, later: bool) -> None:
    """InputError for a requirement that the evaluation will refuse, before the days of training that come first.
    later: whether a run of the compiled pipeline may still give what is measured."""
    values, shape = made.values, made.shape
    items = shape.instructions != "none" or (shape.start == "adapters" and (later or values["instructions"]))
    sources = {
        "text": later or values["text"] or values["text_validation"],
        "english": later or values["english_text"],
        "instructions": items,
        "choices": items,
        "questions": later or values["questions"],
    }
    measured = [name for name, there in sources.items() if there]
    # what exams are called is known when they are read
    exams = [""] if later or values["exams"] else []
    requirements = parse_requirements(str(values["require"]), option)
    check_requirements(requirements, shape.labels, measured, exams, option=option, mends=_MEASURED)


def _resolved(size: Size, chosen: Mapping[str, Value]) -> tuple[Size, dict[str, Value]]:
    """The size with the settings that stand over its fields, a training's own over the one for all three; and every
    setting, its default where nothing was chosen."""
    for name in sorted(chosen.keys() & SETTINGS.keys(), key=lambda name: (-len(SETTINGS[name].fields), name)):
        value, (_, option) = chosen[name], SETTINGS[name].option or (None, "")
        least = 0 if name == "lora_dropout" else 1e-12
        if isinstance(value, int | float) and not isinstance(value, bool) and value < least and option not in SIZED:
            # "as many as the epochs give", "as the adapter that is gone on from": the planner keeps the size's figure
            continue
        for path in SETTINGS[name].fields if value is not None else ():
            size = _replaced(size, path, value)
    values = {name: chosen.get(name, setting.default(size)) for name, setting in SETTINGS.items()}
    if values["tokenizer"] == "keep" and values["start"] in ("weights", "model"):
        # no new rows: nothing that only the embeddings would have to learn
        values |= {"run_stage1": chosen.get("run_stage1", False)}
        values |= {"lora_freeze_embeddings": chosen.get("lora_freeze_embeddings", True)}
    return size, values


def _replaced(record: Any, path: str, value: Value) -> Any:
    name, _, rest = path.partition(".")
    return dataclasses.replace(record, **{name: _replaced(getattr(record, name), rest, value) if rest else value})


# --- for a cluster ----------------------------------------------------------------------------------------------------
def check_for_cluster(made: Configuration) -> None:
    """InputError for what only works on one's own machine."""
    if made["backend"] == "local":
        raise InputError("--set backend=local: steps of a cluster train nothing themselves; use pytorchjob or trainjob")
    store = str(made["store"] or "")
    try:
        shared = storage.is_s3(storage.normalise(store))
    except InputError as error:
        raise InputError(f"--set store={store}: {error}") from error
    if not shared:
        raise InputError(f"--set store={store}: steps of a cluster share S3 alone; give s3://bucket/prefix")
    for name, setting in SETTINGS.items():
        for part in str(made[name] or "").split(",") if setting.address else ():
            if part.startswith(("/", "./", "../", "~", "file:")):
                raise InputError(f"--set {name}: {part} is of this machine, which no pod sees; copy it to S3 first")


def refuse_compiled(names: Sequence[str], parameters: Sequence[str], where: str) -> None:
    """InputError for settings that a compiled package cannot be told any more."""
    for name in names:
        if name in parameters or name not in SETTINGS:
            continue
        if SETTINGS[name].compiled:
            raise InputError(
                f"--set {name}: it is decided when a pipeline is compiled, and {where} is; compile another: "
                f"zhllama compile --set {name}=…"
            )
        raise InputError(f"--set {name}: {where} was compiled for a course that does not read it; compile another")
