"""The KFP signature of evaluate."""

from kfp import dsl

from zhllama.kubernetes.images import image


@dsl.container_component
def evaluate(
    store: str,
    model: str,
    ref: dsl.OutputPath(str),  # type: ignore[valid-type]
    evaluation: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
    baseline: str = "",
    baseline_2: str = "",
    baseline_3: str = "",
    labels: str = "",
    text: str = "",
    text_validation: str = "",
    english: str = "",
    instructions: str = "",
    instructions_validation: str = "",
    trainings: str = "",
    trainings_2: str = "",
    trainings_3: str = "",
    exams: str = "",
    shots: str = "0,5",
    max_questions: int = 0,
    prompts: str = "",
    max_prompts: int = 12,
    lm_eval: str = "",
    lm_eval_tasks: str = "",
    samples: int = 6,
    max_bytes: int = 200_000,
    max_items: int = 500,
):
    return dsl.ContainerSpec(
        image=image("evaluate"),
        command=["python", "-m", "components.evaluate"],
        args=[
            "--store", store,
            "--model", model,
            "--baseline", baseline,
            "--baseline", baseline_2,
            "--baseline", baseline_3,
            "--labels", labels,
            "--text", text,
            "--text-validation", text_validation,
            "--english", english,
            "--instructions", instructions,
            "--instructions-validation", instructions_validation,
            "--trainings", trainings,
            "--trainings", trainings_2,
            "--trainings", trainings_3,
            "--exams", exams,
            "--shots", shots,
            "--max-questions", max_questions,
            "--prompts", prompts,
            "--max-prompts", max_prompts,
            "--lm-eval", lm_eval,
            "--lm-eval-tasks", lm_eval_tasks,
            "--samples", samples,
            "--max-bytes", max_bytes,
            "--max-items", max_items,
            "--output", evaluation.path,
            "--reference", ref,
            "--report", report.path,
            "--executor-input", "{{$}}",
        ],
    )  # fmt: skip
