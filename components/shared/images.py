"""The image of a stage, as compiled pipelines and rendered manifests name it."""

import os

VERSION = "0.1.0"


def image(stage: str) -> str:
    """`<registry>/zhllama-<stage>:<tag>`, from ZHLLAMA_REGISTRY and ZHLLAMA_TAG (default: no registry, the version)."""
    registry = os.environ.get("ZHLLAMA_REGISTRY", "").rstrip("/")
    name = f"zhllama-{stage.replace('_', '-')}:{os.environ.get('ZHLLAMA_TAG') or VERSION}"
    return f"{registry}/{name}" if registry else name
