"""An option of a training is written once, in its options class, and is there wherever it is asked for."""

import subprocess
import sys

PROGRAM = """
import importlib.util, sys
from pathlib import Path
import zhllama.training

# the options of the trainings, with one more
path = Path(zhllama.training.__file__).with_name("options.py")
source = path.read_text()
before = "    max_grad_norm: float"
assert source.count(before) == 1
more = '''    label_smoothing: float = 0.0
    "Share of the loss that goes to the other tokens."
'''
patched = Path(sys.argv[1], "options.py")
patched.write_text(source.replace(before, more + before))
spec = importlib.util.spec_from_file_location("zhllama.training.options", patched)
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)

from components.launch_training.options import LaunchTraining
from components.pretrain.component import pretrain
from pipelines import parameters
from pipelines.adapt_llama import compile_pipeline
from pipelines.configuration import configure
from pipelines.manifests.render import as_yaml, training_job
from pipelines.sizes import load
from zhllama.stage.command_line import parse

addresses = {"store": "s3://bucket/s", "model": "s3://bucket/m", "dataset": "s3://bucket/d"}
words = [f"--{name}={address}" for name, address in addresses.items()]
given = parse(module.PretrainOptions, ["--stage=lora", *words, "--label-smoothing=0.1"])
assert given.label_smoothing == 0.1, given.label_smoothing

described = pretrain.component_spec.inputs["label_smoothing"]
assert (described.type, described.default) == ("Float", 0.0)
assert described.description == "Share of the loss that goes to the other tokens."

launched = LaunchTraining(stage="lora", training=("--label-smoothing", "0.1"), **addresses)
assert launched.training_arguments("/out")[-2:] == ["--label-smoothing", "0.1"]

told = configure("7b", {"lora_label_smoothing": "0.1"})
compile_pipeline(told, Path(sys.argv[1]) / "p.yaml")
compiled = " ".join((Path(sys.argv[1]) / "p.yaml").read_text().split())
assert compiled.count("--label-smoothing 0.1") == 1

rendered = as_yaml(training_job(load("7b"), "lora", arguments="--label-smoothing 0.1", **addresses))
assert "--label-smoothing" in rendered

page = parameters.table()
for training in ("embeddings", "lora", "sft"):
    assert f"`{training}_label_smoothing`" in page
assert "share of the loss that goes to the other tokens" in page
print("everywhere")
"""


def test_an_option_that_is_added_to_a_training_is_found_everywhere(tmp_path):
    words = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.strip() == "everywhere", done.stderr[-3000:]
