"""serve as KFP components: one question to a model here, or its deployment."""

from kfp import dsl

from components.serve.options import Serve
from zhllama.stage.component import component_of

serve = component_of(
    Serve, only=("store", "model", "ask"), defaults={"ask": "你好，请介绍一下你自己。"}, samples=dsl.Artifact
)

# `ref` is the address at which the model answers, `tried` what it was asked there and answered. The step needs the
# machine's `api_key_secret` at /etc/zhllama-api-key (`kubernetes.use_secret_as_volume`), or its API_KEY as the variable
# ZHLLAMA_API_KEY, and its account the Role zhllama-deployer.
deploy = component_of(Serve, name="deploy", only=("model", "machine"), tried=dsl.Artifact)
