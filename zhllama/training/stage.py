"""The body of pretrain and finetune, which differ in their options alone: checked inputs, then processes that train."""

from zhllama.artifacts.cache import materialize, require_room
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.stage.inputs import Inputs
from zhllama.stage.options import option_of
from zhllama.training.checkpoints import Run, open_checkpoint, require_same_run
from zhllama.training.elastic import Deadline, run_workers
from zhllama.training.inputs import checked_inputs
from zhllama.training.options import TrainingOptions
from zhllama.weights.safetensors_io import Checkpoint


def run_training(options: TrainingOptions, opened: Inputs, out: ArtifactWriter) -> Manifest:
    """Trains in as many processes as PET_* says (one without) and returns what they published; with
    `publish_checkpoint`, what the checkpoint holds."""
    with Deadline() as deadline:
        inputs = checked_inputs(options, opened)
        run = Run.of(options, out)
        for name in ("resume_from_checkpoint", "publish_checkpoint"):
            if reference := getattr(options, name):
                option = option_of(name)
                require_same_run(open_checkpoint(reference, option).manifest, run, option)
        # once a node, before its processes start: they find them there
        model = Checkpoint(inputs.model).artifact
        given = [one for one in (model, inputs.dataset, inputs.replay, inputs.adapter) if one is not None]
        require_room(given)
        for artifact in given:
            materialize(artifact, recheck=True)
        if options.publish_checkpoint:
            from zhllama.training.worker import publish_checkpoint

            return publish_checkpoint(run, opened, inputs)
        return run_workers(train_worker, run, deadline)


def train_worker(run: Run) -> None:
    """One process of the training; torch is loaded there alone."""
    from zhllama.training.worker import run_worker

    run_worker(run)
