// Every image, for one tag:
//
//   docker buildx bake                                                    all
//   docker buildx bake without-torch                                      those that a pipeline's small steps need
//   TAG=1.2.3 REGISTRY=registry.example.com/team ATTEST=true docker buildx bake --push
//
// A stage's image is two layers on an image that has Python: what its extra needs (images/base; shared by the stages
// of that extra) and the code (images/<stage>; the same layer in all of them). docs/images.md says more.

variable "REGISTRY" {
  default = ""
}

variable "TAG" {
  default = "0.1.0"
}

// For the labels that say what an image is: its version (the tag, unless that is a passing one), commit, repository.
variable "VERSION" {
  default = TAG
}

variable "REVISION" {
  default = ""
}

variable "SOURCE" {
  default = ""
}

// What the images stand on, each by digest where it is known. The small steps: Python alone.
variable "PYTHON_IMAGE" {
  default = "python:3.11.16-slim@sha256:9c900dea9e8fb7e16277c179b555cc72d29a352dbc33cff48ad5a0412fd5bfc7"
}

// Training and all that computes: PyTorch's own CUDA image, with the torch that constraints.txt pins. For processors
// alone: TORCH_IMAGE=python:3.11.16-slim and TORCH_INDEX_ARGS; torch then comes from the index.
variable "TORCH_IMAGE" {
  default = "pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime@sha256:db80a41f8428644cebcb3d75b0b62df334ab6c0e75785951eb25f48bfbd42407"
}

// Serving: vLLM's own image, the one that served models run (zhllama/kubernetes/model_server.py), so that a node pulls
// it once. Likewise SERVE_IMAGE=python:3.11.16-slim for processors alone.
variable "SERVE_IMAGE" {
  default = "vllm/vllm-openai:v0.33.0"
}

// Installed where the base brings no torch.
variable "TORCH_SPEC" {
  default = "torch==2.13.0"
}

// pip's options for torch alone. PyPI's build is the CUDA one.
variable "TORCH_INDEX_ARGS" {
  default = ""
}

// linux/amd64,linux/arm64 for the images without torch; the CUDA bases are for amd64. Empty: the builder's own.
variable "PLATFORMS" {
  default = ""
}

// SBOM and provenance beside each image. Docker's default builder cannot hold them unless its containerd image store is
// on, so a release asks for them (with another builder: docker buildx create --use).
variable "ATTEST" {
  default = false
}

// The name that compiled pipelines and rendered manifests use (zhllama/stage/images.py).
function "image" {
  params = [stage]
  result = "${REGISTRY == "" ? "" : "${REGISTRY}/"}zhllama-${replace(stage, "_", "-")}:${TAG}"
}

group "default" {
  targets = ["stage"]
}

group "without-torch" {
  targets = ["control", "data", "generation"]
}

// The stages by what they hold. A release builds group by group, so that each base is built once and on its own.
group "control" {
  targets = ["launch-training"]
}

group "data" {
  targets = ["fetch-weights", "train-tokenizer", "prepare-dataset"]
}

group "generation" {
  targets = ["generate-instructions"]
}

group "training" {
  targets = [
    "convert-weights", "extend-tokenizer", "pretrain", "finetune", "merge-adapters", "merge-models", "evaluate",
    "generate",
  ]
}

group "export" {
  targets = ["export-model"]
}

group "serving" {
  targets = ["serve"]
}

target "common" {
  platforms = compact(split(",", PLATFORMS))
}

target "base" {
  name       = "base-${extra}"
  matrix     = { extra = ["control", "data", "train", "generate", "serve", "gguf"] }
  inherits   = ["common"]
  dockerfile = "images/base/Dockerfile"
  args = {
    EXTRA            = extra
    BASE_IMAGE       = extra == "serve" ? SERVE_IMAGE : contains(["train", "gguf"], extra) ? TORCH_IMAGE : PYTHON_IMAGE
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
      { stage = "merge_models", extra = "train" },
      { stage = "export_model", extra = "gguf" },
      { stage = "evaluate", extra = "train" },
      { stage = "generate", extra = "train" },
      { stage = "serve", extra = "serve" },
    ]
  }
  inherits   = ["common"]
  dockerfile = "images/${built.stage}/Dockerfile"
  contexts   = { base = "target:base-${built.extra}" }
  tags       = [image(built.stage)]
  attest     = ATTEST ? ["type=sbom", "type=provenance,mode=max"] : []
  args = {
    BASE     = "base"
    VERSION  = VERSION
    REVISION = REVISION
    SOURCE   = SOURCE
  }
}
