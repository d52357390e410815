from kfp import dsl

from components.convert_weights.options import ConvertWeights
from zhllama.stage.component import component_of

convert_weights = component_of(ConvertWeights, model=dsl.Model)
