from kfp import dsl

from components.finetune.options import Finetune
from zhllama.stage.component import component_of

finetune = component_of(Finetune, adapted=dsl.Model, metrics=dsl.Metrics, report=dsl.HTML)
