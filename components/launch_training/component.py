"""launch_training as a KFP component, and the exit handler that ends what a run left."""

from kfp import dsl

from components.launch_training.cleanup import Cleanup
from components.launch_training.options import LaunchTraining
from zhllama.stage.component import component_of
from zhllama.training.options import EACH_RUN, FinetuneOptions, PretrainOptions

INPUTS = ("model", "dataset", "adapter", "replay", "forgetting_base")
# few inputs: each stands in a run's Workflow a dozen times. The job's machine is one of them, as JSON, the training's
# other options are `arguments`
launch_training = component_of(
    LaunchTraining,
    only=("store", "stage", *INPUTS, "run_id", "backend", "machine", "arguments"),
    joined=("arguments",),
    after=(PretrainOptions, FinetuneOptions),
    only_after=EACH_RUN,
    trained=dsl.Model,
    metrics=dsl.Metrics,
    report=dsl.HTML,
)
cleanup_training = component_of(Cleanup, name="cleanup_training", command="components.launch_training.cleanup")
