"""What KFP compiles is read; what this machine cannot run is refused by name, and so is a package that kfp garbled."""

import pytest
import yaml
from kfp import dsl, kubernetes

from pipelines.local.ir import parse_package, read_package
from pipelines.local.placeholders import Surroundings, command
from pipelines.local.plan import Plan, Snapshot
from zhllama.errors import InputError


@dsl.container_component
def say(value: str, ref: dsl.OutputPath(str)):
    return dsl.ContainerSpec(image="none", command=["say"], args=["--value", value, "--reference", ref])


def test_sub_pipelines_and_exit_handlers_are_read(compiled):
    @dsl.pipeline
    def inner(value: str) -> str:
        return say(value=value).outputs["ref"]

    @dsl.pipeline(name="outer")
    def outer(value: str, count: int = 3):
        with dsl.ExitHandler(say(value=dsl.PIPELINE_JOB_ID_PLACEHOLDER).set_display_name("tidy up")):
            say(value=inner(value=value).output)

    package = read_package(compiled(outer))
    assert package.name == "outer"
    assert package.root.parameters["count"].default == 3
    assert {task.title for task in package.root.tasks.values()} == {"tidy up", "exit-handler-1"}


def only_if(value: str):
    with dsl.If(value == ""):
        say(value=value)


def if_elif_else(value: str):
    with dsl.If(value == ""):
        say(value="a")
    with dsl.Elif(value == "x"):
        say(value="b")
    with dsl.Else():
        say(value=value)


def one_of(value: str):
    with dsl.If(value == ""):
        first = say(value="a")
    with dsl.Else():
        second = say(value=value)
    say(value=dsl.OneOf(first.outputs["ref"], second.outputs["ref"]))


@pytest.mark.parametrize("function", [only_if, if_elif_else, one_of])
def test_a_choice_is_refused_by_name_and_the_place_where_it_is_made_told(compiled, function):
    path = compiled(dsl.pipeline(name="outer")(function))
    with pytest.raises(
        InputError, match=r"(condition \(dsl\.If|\(dsl\.OneOf).*decided when our pipelines are compiled; run"
    ):
        read_package(path)


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


@dsl.container_component
def say_twice(value: str, again: str = "and again"):
    return dsl.ContainerSpec(image="none", command=["say"], args=[value, again])


def test_a_step_that_leaves_an_input_to_its_default_is_refused_in_the_drivers_words(compiled):
    @dsl.pipeline(name="outer")
    def outer(value: str):
        with dsl.ExitHandler(say(value="bye")):
            say_twice(value=value)

    with pytest.raises(
        InputError,
        match=r'say-twice: it passes nothing for the input again, .*parameter "again" not found in executor inp',
    ):
        read_package(compiled(outer))


def test_a_sub_pipelines_default_is_filled_in_as_kfp_does_for_groups(compiled):
    @dsl.pipeline
    def inner(value: str, again: str = "and again"):
        say_twice(value=value, again=again)

    @dsl.pipeline(name="outer")
    def outer(value: str):
        inner(value=value)

    plan = Plan(read_package(compiled(outer)), {"value": "a"}, {})
    assert Snapshot(plan, {}).inputs(("inner", "say-twice"))[0] == {"value": "a", "again": "and again"}


def test_an_input_whose_absence_a_component_asks_for_may_be_left_out(compiled):
    @dsl.container_component
    def perhaps(value: str = "default"):
        asked = dsl.IfPresentPlaceholder("value", then=["--value", value], else_=["--none"])
        return dsl.ContainerSpec(image="none", command=["say"], args=[asked])

    @dsl.pipeline(name="outer")
    def outer():
        perhaps()

    plan = Plan(read_package(compiled(outer)), {}, {})
    plan.rehearse()
    assert command(plan.steps[0].component.words, Surroundings({})) == ["say", "--none"]


@dsl.container_component
def joined(value: str):
    return dsl.ContainerSpec(image="none", command=["say"], args=[dsl.ConcatPlaceholder(["--value=", value])])


@dsl.container_component
def told_the_run():
    return dsl.ContainerSpec(image="none", command=["say"], args=[dsl.PIPELINE_JOB_ID_PLACEHOLDER])


def concat(value: str):
    joined(value=value)


def run_in_a_command(value: str):
    told_the_run()


def run_in_a_text(value: str):
    say(value=f"run {dsl.PIPELINE_JOB_ID_PLACEHOLDER}")


def after_an_exit_handler(value: str):
    last = say(value=value).after(say(value="first")).ignore_upstream_failure()
    say(value="x").after(last)


def two_exit_handlers(value: str):
    first = say(value="first")
    for text in ("one", "two"):
        say(value=text).after(first).ignore_upstream_failure()


def exit_handler_of_two(value: str):
    say(value=value).after(say(value="one"), say(value="two")).ignore_upstream_failure()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (two_exit_handlers, "not the only exit handler of say; KFP would run one of them"),
        (exit_handler_of_two, "an exit handler of 2 tasks; KFP would run it once for each"),
        (concat, r'KFP 2\.17 hands {"Concat": …} on as it stands'),
        (run_in_a_command, r"KFP 2\.17 leaves {{\$\.pipeline_job_uuid}} as it stands"),
        (run_in_a_text, r"KFP 2\.17 leaves {{\$\.pipeline_job_uuid}} as it stands"),
        (after_an_exit_handler, "it waits for say, which KFP runs as an exit handler"),
    ],
)
def test_what_kfp_compiles_and_its_backend_does_not_do_is_refused(compiled, function, message):
    path = compiled(dsl.pipeline(name="outer")(function))
    with pytest.raises(InputError, match=message):
        read_package(path)


def test_a_pipeline_that_contains_itself_or_unfolds_without_end_is_refused(compiled):
    @dsl.pipeline
    def inner(value: str):
        say(value=value)

    @dsl.pipeline(name="outer")
    def outer(value: str):
        inner(value=value)

    spec = yaml.safe_load(compiled(outer).read_text())
    graph = spec["components"]["comp-inner"]["dag"]["tasks"]
    graph["again"] = {**graph["say"], "componentRef": {"name": "comp-inner"}}
    with pytest.raises(InputError, match="here: comp-inner contains itself"):
        parse_package([spec], "here")

    del graph["again"]
    for level in range(40):
        below = "comp-inner" if level == 0 else f"comp-{level - 1}"
        task = {**graph["say"], "componentRef": {"name": below}}
        spec["components"][f"comp-{level}"] = {
            **spec["components"]["comp-inner"],
            "dag": {"tasks": {"one": task, "two": task}},
        }
    spec["root"]["dag"]["tasks"]["inner"]["componentRef"]["name"] = "comp-39"
    with pytest.raises(InputError, match=f"here: it holds {2**40} steps; at most 1000 can run"):
        parse_package([spec], "here")


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
