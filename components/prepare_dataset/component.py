from kfp import dsl

from components.prepare_dataset.options import PrepareDataset
from zhllama.stage.component import component_of

prepare_dataset = component_of(PrepareDataset, dataset=dsl.Dataset, metrics=dsl.Metrics)
