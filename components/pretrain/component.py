from kfp import dsl

from components.pretrain.options import Pretrain
from zhllama.stage.component import component_of

pretrain = component_of(Pretrain, trained=dsl.Model, metrics=dsl.Metrics, report=dsl.HTML)
