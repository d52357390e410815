"""launch_training as a KFP component, and the exit handler that ends what a run left."""

from kfp import dsl

from components.launch_training.cleanup import Cleanup
from components.launch_training.options import LaunchTraining
from zhllama.stage.component import component_of
from zhllama.training.options import FinetuneOptions, PretrainOptions

launch_training = component_of(
    LaunchTraining, joined=("arguments",), after=(PretrainOptions, FinetuneOptions),
    trained=dsl.Model, metrics=dsl.Metrics, report=dsl.HTML,
)  # fmt: skip
cleanup_training = component_of(Cleanup, name="cleanup_training", command="components.launch_training.cleanup")
