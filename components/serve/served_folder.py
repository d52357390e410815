"""The folder that is served: the artifact's files by link, and generation settings that answer as the recipe does.

A published model says nothing of sampling, and the server takes what it does not find in a request from the model's
generation_config.json: left as it is, it would decode greedily and ignore a request's temperature.
"""

import json
from pathlib import Path

from zhllama import storage
from zhllama.artifacts.json_file import read_object
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.inference.sampling import Sampling
from zhllama.tokenizer.prompt import wrap
from zhllama.tokenizer.vocabulary import Encoder

GENERATION = "generation_config.json"
LINES = (
    "你好，世界！今天天气不错。",
    "The quick brown fox, 3.14 and more.",
    "  两个  空格，制表\t和换行\n之后",
    "全角１２３，生僻字𠀀，表情🀄，重音é",
    "for i in range(10):\n    print(i)",
    "",
)
"""What the served tokenizer is tried on."""


def lay_out(source: Path, target: Path, encoder: Encoder) -> Path:
    """Links the files of a model folder into `target`, with generation settings of our own; returns `target`."""
    target.mkdir()
    for file in source.iterdir():
        if file.name != GENERATION:
            (target / file.name).symlink_to(file.resolve())
    recipe = Sampling()
    settings = {
        "do_sample": True,
        "temperature": recipe.temperature,
        "top_k": recipe.top_k,
        "top_p": recipe.top_p,
        "repetition_penalty": recipe.repetition_penalty,
        "bos_token_id": encoder.bos,
        "eos_token_id": encoder.eos,
        "pad_token_id": encoder.eos if encoder.pad is None else encoder.pad,
    }
    given = source / GENERATION
    if given.exists():
        settings |= json.loads(given.read_text())
    (target / GENERATION).write_text(json.dumps(settings, indent=1) + "\n")
    return target


def check_sizes(artifact: Artifact, where: str) -> None:
    """InputError when a file that the manifest names is not there, or of another size."""
    there = {item.name: item.size for item in storage.listing(artifact.root)} if artifact.verified else {}
    for name in artifact.names if artifact.verified else ():
        size = artifact.file(name).size
        if there.get(name) != size:
            found = f"{there[name]} bytes" if name in there else "not there"
            raise InputError(f"{where}: {name} is {found}, the manifest says {size} bytes; publish the model again")


def positions_of(artifact: Artifact) -> int:
    """Tokens of prompt and answer together, from config.json. InputError where it does not say."""
    try:
        return int(read_object(artifact, "config.json")["max_position_embeddings"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--model {artifact.root}: config.json has no max_position_embeddings ({error}); publish it again"
        ) from error


def gguf_file(artifact: Artifact, chosen: str) -> str | None:
    """The GGUF file to serve, or None for a Hugging Face folder. InputError where `chosen` is wrong or needed."""
    files = [name for name in artifact.names if name.endswith(".gguf")]
    if chosen:
        if chosen not in artifact:
            raise InputError(f"--model {artifact.root}: no file {chosen}; it has {', '.join(files) or 'no GGUF file'}")
        return chosen
    if "config.json" in artifact or not files:
        return None
    if len(files) > 1:
        raise InputError(
            f"--model {artifact.root}: {len(files)} GGUF files; choose one with --file: {', '.join(files)}"
        )
    return files[0]


def check_tokenizer(folder: Path, encoder: Encoder, where: str) -> None:
    """InputError unless the folder's tokenizer gives SentencePiece's ids, for text and for a question."""
    from transformers import AutoTokenizer

    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).exists():
            raise InputError(f"{where}: no {name} in it; serve a model that was published with its tokenizer files")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    mend = "publish the model again; with tied scores (--scores zero) no served tokenizer can agree"
    for line in LINES:
        if tokenizer(line)["input_ids"] != [encoder.bos, *encoder.encode(line)]:
            raise InputError(f"{where}: tokenizer.json gives other ids than tokenizer.model for {line!r}; {mend}")
    if not tokenizer.chat_template:
        raise InputError(f"{where}: tokenizer_config.json has no chat template; {mend}")
    for line in LINES[:2]:
        asked = [{"role": "user", "content": line}]
        ids = tokenizer.apply_chat_template(asked, tokenize=True, return_dict=False)
        if list(ids) != [encoder.bos, *encoder.encode(wrap(line))]:
            raise InputError(f"{where}: its chat template is not the training prompt; {mend}")
