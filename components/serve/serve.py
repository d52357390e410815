"""What serve is asked: a server on this machine, one question through it, or a deployment on a cluster.

On this machine the model is checked, its engine started on loopback, and the gateway (gateway.py) listens: 5 s to the
first answer with a tiny model. Before it is announced the tokenizer that the engine uses is held against SentencePiece:
ids in are the ids of training.
"""

import sys

from components.serve.options import Serve
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.stage.command_line import parse
from zhllama.stage.inputs import Inputs
from zhllama.stage.run import run_stage

SAMPLES = "samples.json"


def run() -> None:
    """The command: serve until stopped, ask one question for the store or for the screen, or deploy."""
    config = parse(Serve, sys.argv[1:])
    if config.deploy != "none":
        from components.serve.deploy import deploy

        deploy(config)
    elif config.store:
        run_stage(config, serve_and_ask)
    elif config.ask:
        from components.serve.local import ask

        print(ask(config))
    else:
        from components.serve.local import serve

        serve(config)


def serve_and_ask(config: Serve, inputs: Inputs, out: ArtifactWriter) -> Manifest:
    """Starts the server, asks `--ask`, stops it, and publishes question and answer."""
    from components.serve.local import ask

    answer = ask(config, inputs["model"])
    out.add_json(SAMPLES, [{"Input": config.ask, "Output": answer}])
    out.facts["summary"] = f"{len(answer)} characters answered"
    return out.publish("samples")
