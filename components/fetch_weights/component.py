"""fetch_weights as a KFP component."""

from kfp import dsl

from components.fetch_weights.options import FetchWeights
from zhllama.stage.component import component_of

fetch_weights = component_of(FetchWeights, weights=dsl.Model)
