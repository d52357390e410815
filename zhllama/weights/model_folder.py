"""A model as transformers and vLLM are given it: what was checked, and nothing that merely lies beside it.

Such a program looks through a folder by its own rules: an adapter in it makes it load another model, a second set of
weights may go before the first, a setting stops it that says nothing. Here it finds links to the checked tensors, an
index of them, and of config.json what is done.
"""

import json
from pathlib import Path

from zhllama.artifacts.cache import materialize
from zhllama.models import architecture
from zhllama.storage import write_bytes
from zhllama.weights.model_config import CONFIG, DONE, model_config
from zhllama.weights.safetensors_io import INDEX, Checkpoint, index_json, shard_file
from zhllama.weights.ties import is_tied


def lay_out(checkpoint: Checkpoint, folder: Path) -> Path:
    """The folder, once the model lies in it; the node's cache holds what is not a local safetensors file. InputError as
    model_config."""
    settings = model_config(checkpoint) | {"tie_word_embeddings": is_tied(checkpoint)}
    source = materialize(checkpoint.artifact).absolute()
    names = {file: shard_file(number, len(checkpoint.files)) for number, file in enumerate(checkpoint.files, 1)}
    for file, name in names.items():
        (folder / name).symlink_to((source / file).resolve())
    total = sum(info.length for info in checkpoint.tensors.values())
    place_of = {name: names[info.file] for name, info in checkpoint.tensors.items()}
    write_bytes(str(folder / INDEX), index_json(place_of, total))
    kind = architecture(settings, checkpoint.where)
    done = DONE | kind.flags | kind.windows(settings).keys()
    said = {name: value for name, value in settings.items() if name in done}
    write_bytes(str(folder / CONFIG), json.dumps(said).encode())
    return folder
