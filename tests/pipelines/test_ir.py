"""What KFP compiles is read; what this machine cannot run is refused by name, and so is a package that kfp garbled."""

import pytest
import yaml
from kfp import dsl, kubernetes

from components.shared.errors import InputError
from pipelines.ir import parse_package, read_package


@dsl.container_component
def say(value: str, ref: dsl.OutputPath(str)):
    return dsl.ContainerSpec(image="none", command=["say"], args=["--value", value, "--reference", ref])


def test_branches_sub_pipelines_and_exit_handlers_are_read(compiled):
    @dsl.pipeline
    def inner(value: str) -> str:
        with dsl.If(value == ""):
            first = say(value="a")
        with dsl.Elif(value == "x"):
            second = say(value="b")
        with dsl.Else():
            third = say(value=value)
        return dsl.OneOf(first.outputs["ref"], second.outputs["ref"], third.outputs["ref"])

    @dsl.pipeline(name="outer")
    def outer(value: str, count: int = 3):
        with dsl.ExitHandler(say(value=dsl.PIPELINE_JOB_ID_PLACEHOLDER).set_display_name("tidy up")):
            say(value=inner(value=value).output)

    package = read_package(compiled(outer))
    assert package.name == "outer"
    assert package.root.parameters["count"].default == 3
    assert {task.title for task in package.root.tasks.values()} == {"tidy up", "exit-handler-1"}


def loop(value: str):
    with dsl.ParallelFor([1, 2]) as item:
        say(value=f"{item}")


def retry(value: str):
    say(value=value).set_retry(2)


def importer(value: str):
    dsl.importer(artifact_uri=value, artifact_class=dsl.Model)


def volume(value: str):
    kubernetes.mount_pvc(say(value=value), pvc_name="data", mount_path="/data")


def config_map(value: str):
    kubernetes.use_config_map_as_volume(say(value=value), "data", "/data")


def pipeline_root(value: str):
    say(value=dsl.PIPELINE_ROOT_PLACEHOLDER)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (loop, "parameterIterator"),
        (retry, "retryPolicy"),
        (importer, "importer"),
        (volume, "pvcMount"),
        (config_map, "configMapAsVolume"),
        (pipeline_root, "pipeline_root"),
    ],
    ids=["loop", "retry", "importer", "volume", "config map", "root"],
)
def test_an_unknown_construct_is_refused_by_name(compiled, function, name):
    path = compiled(dsl.pipeline(name="outer")(function))
    with pytest.raises(InputError, match=rf"pipeline\.yaml: .*{name}.*the local runner does not know"):
        read_package(path)


def test_settings_that_only_place_a_pod_are_passed_over(compiled):
    @dsl.pipeline(name="outer")
    def outer(value: str):
        step = say(value=value).set_cpu_limit("2").set_memory_limit("1Gi")
        kubernetes.use_secret_as_env(step, "s3", {"key": "AWS_ACCESS_KEY_ID"})
        kubernetes.add_toleration(step, key="gpu", operator="Exists")
        # it may be absent on a cluster, so the step can do without
        kubernetes.use_config_map_as_volume(step, "authorities", "/etc/authorities", optional=True)

    assert read_package(compiled(outer)).root.tasks["say"].component == "comp-say"


def test_conditions_below_conditions_of_two_pipelines_are_garbled_by_kfp_and_refused_here(compiled):
    """kfp 2.17 puts the outer Else's step into the inner one's branch: this must never run."""

    @dsl.pipeline
    def inner(value: str) -> str:
        with dsl.If(value == ""):
            first = say(value="a")
        with dsl.Else():
            second = say(value=value)
        return dsl.OneOf(first.outputs["ref"], second.outputs["ref"])

    @dsl.pipeline(name="outer")
    def outer(value: str, other: str):
        with dsl.If(value == ""):
            first = say(value=f"{other}!")
        with dsl.Else():
            second = say(value=f"{other}?")
        say(value=dsl.OneOf(first.outputs["ref"], second.outputs["ref"]))
        inner(value=value)

    with pytest.raises(InputError, match="the compiled pipeline is damaged"):
        read_package(compiled(outer))


@pytest.mark.parametrize("content", ["", "a: 1", "- 1\n- 2", "[", "\0"])
def test_what_is_no_pipeline_is_refused(tmp_path, content):
    path = tmp_path / "pipeline.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=r"pipeline\.yaml: not (a compiled pipeline|YAML)"):
        read_package(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.yaml: No such file"):
        read_package(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda spec: spec["components"].pop("comp-say"), "there is no component comp-say"),
        (
            lambda spec: spec["root"]["dag"]["tasks"]["say"]["inputs"]["parameters"].pop("value"),
            "its input value is not",
        ),
        (lambda spec: spec["root"]["dag"]["tasks"]["say"].update(dependentTasks=["gone"]), "it waits for gone"),
        (lambda spec: spec.update(schemaVersion="3.0"), "IR schema 3.0"),
        (lambda spec: spec["deploymentSpec"]["executors"].clear(), "exec-say: it names no command"),
        (lambda spec: spec["root"].update(dag={}), "neither a container nor tasks"),
    ],
    ids=["component", "input", "dependency", "schema", "executor", "empty"],
)
def test_parts_that_do_not_fit_are_named(compiled, damage, message):
    @dsl.pipeline(name="outer")
    def outer(value: str):
        say(value=value)

    spec = yaml.safe_load(compiled(outer).read_text())
    damage(spec)
    with pytest.raises(InputError, match=message):
        parse_package([spec], "here")
