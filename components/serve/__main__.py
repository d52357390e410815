import sys

from components.serve.options import Serve
from zhllama.stage.command_line import parse
from zhllama.stage.program import guarded
from zhllama.stage.run import run_stage


def run() -> None:
    """Serve until stopped, ask one question for the store or for the screen, or deploy."""
    config = parse(Serve, sys.argv[1:])
    if config.deploy != "none":
        from components.serve.deploy import deploy

        deploy(config)
        return
    from components.serve.local import ask, serve, serve_and_ask

    if config.store:
        run_stage(config, serve_and_ask)
    elif config.ask:
        print(ask(config))
    else:
        serve(config)


if __name__ == "__main__":
    guarded(run)
