"""Small pipelines, compiled by KFP, for the runner's tests."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from kfp import compiler, dsl

STEP = str(Path(__file__).parent / "small_step.py")


@dsl.container_component
def echo(value: str, name: str, ref: dsl.OutputPath(str)):
    words = ["--value", value, "--reference", ref, "--name", name]
    return dsl.ContainerSpec(image="none", command=["python", STEP], args=["echo", *words])


@dsl.container_component
def publish(
    store: str,
    value: str,
    ref: dsl.OutputPath(str),
    metrics: dsl.Output[dsl.Metrics],
    name: str,
    source: str,
):
    """As a step of our pipelines: what it publishes is in the store, and no artifact of KFP's."""
    words = ["--store", store, "--value", value, "--reference", ref, "--name", name, "--place", source]
    words += ["--executor-output", "{{$.outputs.output_file}}"]
    return dsl.ContainerSpec(image="none", command=["python", STEP], args=["publish", *words])


@dsl.container_component
def meet(place: str, name: str, ref: dsl.OutputPath(str)):
    words = ["--place", place, "--name", name, "--reference", ref]
    return dsl.ContainerSpec(image="none", command=["python", STEP], args=["meet", *words])


@dsl.container_component
def hang(place: str, after: str):
    words = ["--place", place, "--name", "hang", "--value", after]
    return dsl.ContainerSpec(image="none", command=["python", STEP], args=["hang", *words])


@dsl.container_component
def fail(value: str, code: int):
    words = ["--value", value, "--code", code, "--name", "fail"]
    return dsl.ContainerSpec(image="none", command=["python", STEP], args=["fail", *words])


@dsl.container_component
def tidy(name: str):
    words = ["--reference", "/dev/null", "--name", name]
    return dsl.ContainerSpec(image="none", command=["python", STEP], args=["echo", *words])


class Steps:
    """The components above, for pipelines in tests: each input is passed, as KFP's driver wants it."""

    echo = partial(echo, name="echo")
    publish = partial(publish, name="publish", source="")
    meet = partial(meet)
    hang = partial(hang, after="")
    fail = partial(fail)
    tidy = partial(tidy, name="tidy")


@pytest.fixture(scope="session")
def steps() -> type[Steps]:
    return Steps


@pytest.fixture
def compiled(tmp_path: Path) -> Callable[[Any], Path]:
    """Compiles a pipeline function into a YAML file."""

    def compile_it(pipeline: Any) -> Path:
        path = tmp_path / "pipeline.yaml"
        compiler.Compiler().compile(pipeline, str(path))
        return path

    return compile_it


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where steps write their names when they run."""
    path = tmp_path / "journal"
    path.touch()
    monkeypatch.setenv("JOURNAL", str(path))
    return path


@pytest.fixture
def ran(journal: Path) -> Callable[[], list[str]]:
    return lambda: journal.read_text(encoding="utf-8").split()
