"""A model whose folder names tokens beyond its tokenizer.model, as trainers of ChatML leave it."""

import json
import shutil
from pathlib import Path

import pytest

START, END = "<|im_start|>", "<|im_end|>"


@pytest.fixture(params=["added_tokens.json", "tokenizer.json alone"])
def chatml_model(request: pytest.FixtureRequest, tmp_path: Path, tiny_model: str) -> Path:
    """The tiny model as a plain folder with rows 800 and 801 for ChatML's tokens, END as its EOS; once as older
    libraries write it, once as transformers 5 saves it."""
    import torch
    from safetensors.torch import load_file, save_file

    from zhllama.models.architecture import EMBEDDING, HEAD

    folder = shutil.copytree(Path(tiny_model).parent, tmp_path / "chatml")
    (folder / "manifest.json").unlink()
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in {EMBEDDING, HEAD} & tensors.keys():
            more = torch.arange(128, dtype=torch.float16).reshape(2, 64) / 128
            tensors[name] = torch.cat([tensors[name], more])
        save_file(tensors, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 802, "eos_token_id": 801}))
    if request.param == "added_tokens.json":
        (folder / "tokenizer.json").unlink()
        (folder / "added_tokens.json").write_text(json.dumps({START: 800, END: 801}))
        settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"eos_token": END}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return folder
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([START, END], special_tokens=True)
    tokenizer.eos_token = END
    (folder / "tokenizer.model").unlink()
    tokenizer.save_pretrained(folder)
    return folder
