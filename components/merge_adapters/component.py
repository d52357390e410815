from kfp import dsl

from components.merge_adapters.options import MergeAdapters
from zhllama.stage.component import component_of

merge_adapters = component_of(MergeAdapters, repeated={"adapters": 2}, merged=dsl.Model, metrics=dsl.Metrics)
