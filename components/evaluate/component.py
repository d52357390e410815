"""evaluate as a KFP component."""

from kfp import dsl

from components.evaluate.options import Evaluate
from zhllama.stage.component import component_of

evaluate = component_of(
    Evaluate, repeated={"baseline": 3, "trainings": 3}, evaluation=dsl.Artifact, report=dsl.HTML, metrics=dsl.Metrics
)
