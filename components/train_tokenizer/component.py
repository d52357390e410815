from kfp import dsl

from components.train_tokenizer.options import TrainTokenizer
from zhllama.stage.component import component_of

train_tokenizer = component_of(TrainTokenizer, tokenizer=dsl.Artifact, metrics=dsl.Metrics)
