from kfp import dsl

from components.extend_tokenizer.options import ExtendTokenizer
from zhllama.stage.component import component_of

extend_tokenizer = component_of(ExtendTokenizer, extended=dsl.Model)
