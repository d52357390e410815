"""generate as a KFP component."""

from kfp import dsl

from components.generate.options import Generate
from zhllama.stage.component import component_of

generate = component_of(Generate, samples=dsl.Artifact)
