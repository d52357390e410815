"""The KFP signature of generate_instructions. The key comes as OPENAI_API_KEY from a secret of the pipeline's."""

from kfp import dsl

from zhllama.kubernetes.images import image


@dsl.container_component
def generate_instructions(
    store: str,
    ref: dsl.OutputPath(str),  # type: ignore[valid-type]
    instructions: dsl.Output[dsl.Dataset],
    report: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
    items: int = 0,
    base_url: str = "",
    model: str = "",
    import_from: str = "",
    seeds: str = "",
    against: str = "",
    catalogue: str = "",
    max_cost: float = 0,
    max_tokens: int = 0,
    price_prompt: float = -1,
    price_answer: float = -1,
    per_request: int = 20,
    answer_tokens: int = 8192,
    temperature: float = 1.0,
    seed: int = 42,
    fruitless: int = 5,
    concurrency: int = 16,
    requests_per_minute: float = 0,
    tokens_per_minute: float = 0,
    timeout: float = 300,
    structured: str = "auto",
    stream: bool = True,
    batch: bool = False,
):
    return dsl.ContainerSpec(
        image=image("generate_instructions"),
        command=["python", "-m", "components.generate_instructions"],
        args=[
            "--store", store,
            "--items", items,
            "--base-url", base_url,
            "--model", model,
            "--import-from", import_from,
            "--seeds", seeds,
            "--against", against,
            "--catalogue", catalogue,
            "--max-cost", max_cost,
            "--max-tokens", max_tokens,
            "--price-prompt", price_prompt,
            "--price-answer", price_answer,
            "--per-request", per_request,
            "--answer-tokens", answer_tokens,
            "--temperature", temperature,
            "--seed", seed,
            "--fruitless", fruitless,
            "--concurrency", concurrency,
            "--requests-per-minute", requests_per_minute,
            "--tokens-per-minute", tokens_per_minute,
            "--timeout", timeout,
            "--structured", structured,
            "--stream", stream,
            "--batch", batch,
            "--output", instructions.path,
            "--reference", ref,
            "--report", report.path,
            "--executor-input", "{{$}}",
        ],
    )  # fmt: skip
