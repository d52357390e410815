// Every image, for one tag:
//
//   docker buildx bake                                                    all
//   docker buildx bake without-torch                                      those that a pipeline's small steps need
//   TAG=1.2.3 REGISTRY=registry.example.com/team docker buildx bake --push
//
// A stage's image is two layers on Python: what its extra needs (images/base; shared by the stages of that extra) and
// the code (images/<stage>; the same layer in all of them).

variable "REGISTRY" {
  default = ""
}

variable "TAG" {
  default = "0.1.0"
}

// The commit, for the label that says where an image comes from.
variable "REVISION" {
  default = ""
}

// By digest for a release: python@sha256:…
variable "PYTHON_IMAGE" {
  default = "python:3.11-slim"
}

variable "TORCH_SPEC" {
  default = "torch==2.13.0"
}

// pip's options for torch alone. PyPI's build is the CUDA one, right for GPU nodes.
variable "TORCH_INDEX_ARGS" {
  default = ""
}

// The name that compiled pipelines and rendered manifests use (components/shared/images.py).
function "image" {
  params = [stage]
  result = "${REGISTRY == "" ? "" : "${REGISTRY}/"}zhllama-${replace(stage, "_", "-")}:${TAG}"
}

group "default" {
  targets = ["stage"]
}

group "without-torch" {
  targets = ["fetch-weights", "launch-training", "train-tokenizer", "prepare-dataset", "generate-instructions"]
}

target "base" {
  name       = "base-${extra}"
  matrix     = { extra = ["control", "data", "train", "generate", "serve", "gguf"] }
  dockerfile = "images/base/Dockerfile"
  args = {
    EXTRA            = extra
    PYTHON_IMAGE     = PYTHON_IMAGE
    TORCH_SPEC       = contains(["train", "serve", "gguf"], extra) ? TORCH_SPEC : ""
    TORCH_INDEX_ARGS = TORCH_INDEX_ARGS
  }
}

target "stage" {
  name = replace(built.stage, "_", "-")
  matrix = {
    built = [
      { stage = "fetch_weights", extra = "data" },
      { stage = "convert_weights", extra = "train" },
      { stage = "train_tokenizer", extra = "data" },
      { stage = "extend_tokenizer", extra = "train" },
      { stage = "generate_instructions", extra = "generate" },
      { stage = "prepare_dataset", extra = "data" },
      { stage = "pretrain", extra = "train" },
      { stage = "finetune", extra = "train" },
      { stage = "launch_training", extra = "control" },
      { stage = "merge_adapters", extra = "train" },
      { stage = "export_model", extra = "gguf" },
      { stage = "evaluate", extra = "train" },
      { stage = "generate", extra = "train" },
      { stage = "serve", extra = "serve" },
    ]
  }
  dockerfile = "images/${built.stage}/Dockerfile"
  contexts   = { base = "target:base-${built.extra}" }
  tags       = [image(built.stage)]
  args = {
    BASE     = "base"
    VERSION  = TAG
    REVISION = REVISION
  }
}
