"""generate_instructions as a KFP component."""

from kfp import dsl

from components.generate_instructions.options import GenerateInstructions
from zhllama.stage.component import component_of

generate_instructions = component_of(
    GenerateInstructions, instructions=dsl.Dataset, report=dsl.HTML, metrics=dsl.Metrics
)
