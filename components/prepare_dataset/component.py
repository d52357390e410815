from kfp import dsl

from components.prepare_dataset.options import PrepareDataset
from zhllama.stage.component import component_of

prepare_dataset = component_of(PrepareDataset, repeated={"evaluation": 2}, dataset=dsl.Dataset, metrics=dsl.Metrics)
