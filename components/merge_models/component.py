from kfp import dsl

from components.merge_models.options import MergeModels
from zhllama.stage.component import component_of

merge_models = component_of(MergeModels, merged=dsl.Model, metrics=dsl.Metrics)
