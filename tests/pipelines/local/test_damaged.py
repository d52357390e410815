"""Pipelines of others: each is planned, or refused in one line, within memory and time, and writes where it should."""

import copy
import datetime
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kfp import compiler, dsl, kubernetes

from pipelines.local.ir import parse_package, read_package
from pipelines.local.ir_schema import LONGEST
from pipelines.local.plan import Plan, checked_arguments, folder_of
from zhllama.errors import InputError


@dsl.container_component
def say(
    value: str, count: int, model: dsl.Input[dsl.Artifact], ref: dsl.OutputPath(str), made: dsl.Output[dsl.Artifact]
):
    return dsl.ContainerSpec(
        image="none",
        command=["sh", "-c", "echo"],
        args=["--value", value, "--model", model.path, dsl.IfPresentPlaceholder("count", ["--count", count]),
              ref, made.uri],
    )  # fmt: skip


@dsl.container_component
def begin(value: str, made: dsl.Output[dsl.Artifact]):
    return dsl.ContainerSpec(image="none", command=["sh"], args=[value, made.path])


@dsl.container_component
def tidy(run: str):
    return dsl.ContainerSpec(image="none", command=["sh"], args=[run])


@dsl.pipeline
def inner(value: str, model: dsl.Input[dsl.Artifact], count: int = 3) -> str:
    return say(value=f"the {value}", count=count, model=model).outputs["ref"]


@dsl.pipeline(name="outer")
def outer(value: str = "a", rate: float = 0.5, names: list = ["x"], more: dict = {"a": 1}, on: bool = True):  # noqa: B006
    with dsl.ExitHandler(tidy(run=dsl.PIPELINE_JOB_ID_PLACEHOLDER)):
        first = begin(value=value)
        second = inner(value=value, model=first.outputs["made"], count=2)
        last = begin(value=second.output).set_env_variable("A", "1")
        kubernetes.use_secret_as_env(last, "s3", {"key": "AWS_ACCESS_KEY_ID"})
        kubernetes.use_config_map_as_volume(last, "authorities", "/etc/authorities", optional=True)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    path = tmp_path_factory.mktemp("compiled") / "pipeline.yaml"
    compiler.Compiler().compile(outer, str(path))
    return list(yaml.safe_load_all(path.read_text("utf-8")))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a document, the whole left out."""
    for key, one in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(one, (*path, key))


def holder(documents: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        documents = documents[key]
    return documents


GONE = object()
VALUES = (
    GONE, None, True, 0, -1, 1.5, float("nan"), float("inf"), 10**400, "", " ", "x", "..", "../../../../evil",
    "/etc/passwd", "a\nb", "a\x1b[2Jb", "nul\0", "\ud800", "²", "x" * 5000, [], {}, [[]], [{}], {"": ""}, {"x": None},
    {1: 2}, {"a\nb": {}}, ["../evil"], datetime.date(2026, 1, 1), b"bytes", {"x"}, "{{$}}",
    "{{$.outputs.parameters['ref'].output_file}}",
    "{{$.inputs.parameters['none']}}", '{"IfPresent": {"InputName": ["a"], "Then": 1}}', '{"IfPresent": {"Then": []}}',
    "{{$" * 1000,
)  # fmt: skip
"""What stands somewhere in place of what belongs there."""
NAMES = ("", "..", "../../evil", "/abs", "a\nb", "nul\0", "²" * 3, "x" * 300, "root", 1, None, "*", "9" * 5000)
"""And in place of a key."""


def damaged(documents: list[Any], path: tuple[Any, ...], value: Any) -> list[Any]:
    made = copy.deepcopy(documents)
    inside = holder(made, path)
    if value is GONE:
        del inside[path[-1]]
    else:
        inside[path[-1]] = copy.deepcopy(value)
    return made


def renamed(documents: list[Any], path: tuple[Any, ...], name: Any) -> list[Any]:
    made = copy.deepcopy(documents)
    inside = holder(made, path)
    inside[name] = inside.pop(path[-1])
    return made


def planned_or_refused(documents: list[Any]) -> bool:
    """Whether it is planned. Fails unless what refuses it is one line that a terminal can show."""
    try:
        package = parse_package(documents, "here")
        plan = Plan(package, checked_arguments(package, {}), {"pipeline_job_uuid": "1"})
        plan.rehearse()
    except InputError as error:
        said = str(error)
    else:
        said = ""
    if said:
        assert said.isprintable(), repr(said)
        assert 10 < len(said) < 1200
        return False
    for node in plan.steps:
        folder = folder_of(node.name)
        assert folder not in ("", ".", "..")
        assert "/" not in folder
        assert len(folder.encode()) < 256
        for name in (*node.component.output_parameters, *node.component.output_artifacts):
            assert Path("/work/outputs", name).resolve().parent == Path("/work/outputs")
    return True


@pytest.mark.parametrize(
    "name", ["PATH", "LD_PRELOAD", "LD_LIBRARY_PATH", "DYLD_INSERT_LIBRARIES", "PYTHONPATH", "PYTHONSTARTUP",
             "PYTHONWARNINGS", "PYTHONHOME", "BASH_ENV", "BASH_FUNC_python%%", "ENV", "NODE_OPTIONS"],
)  # fmt: skip
def test_a_variable_that_makes_another_program_of_a_command_is_refused_by_name(documents: list[Any], name: str) -> None:
    made = copy.deepcopy(documents)
    (variables,) = [
        one["container"]["env"] for one in made[0]["deploymentSpec"]["executors"].values() if "env" in one["container"]
    ]
    variables[0]["name"] = name
    said = f"it sets {re.escape(name)}: it decides which program or module a command is"
    with pytest.raises(InputError, match=said):
        parse_package(made, "here")
    variables[0]["name"] = "PYTHONUNBUFFERED"
    parse_package(made, "here")


def test_the_whole_one_is_planned(documents: list[Any]) -> None:
    assert planned_or_refused(documents)


def test_every_part_that_is_missing_or_something_else_is_refused_in_one_line_or_harmless(documents: list[Any]) -> None:
    tried = refused = 0
    for number, path in enumerate(places(documents)):
        # each place meets some of the values, each value many places
        for value in (GONE, None, *VALUES[number % 5 :: 5]):
            tried += 1
            refused += not planned_or_refused(damaged(documents, path, value))
        if isinstance(path[-1], str):
            for name in NAMES[number % 3 :: 3]:
                tried += 1
                refused += not planned_or_refused(renamed(documents, path, name))
    assert tried > 2000
    assert refused > tried // 2


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_several_damages_at_once_are_no_worse(documents: list[Any], data: st.DataObject) -> None:
    made = documents
    for _ in range(data.draw(st.integers(1, 4))):
        if not (everywhere := list(places(made))):
            break
        path, other_path = (data.draw(st.sampled_from(everywhere)) for _ in range(2))
        other = holder(made, other_path)[other_path[-1]]
        made = damaged(made, path, data.draw(st.sampled_from((*VALUES, other))))
    planned_or_refused(made)


@pytest.mark.parametrize(
    "name", ["../../../../evil", "/tmp/evil", "a/b", "..", ".", "", "executor_output.json", "a\nb"]
)
@pytest.mark.parametrize("kind", ["parameters", "artifacts"])
def test_no_output_is_written_outside_the_work_folder(documents: list[Any], kind: str, name: str) -> None:
    component = documents[0]["components"]["comp-say"]["outputDefinitions"][kind]
    for path in ("ref",) if kind == "parameters" else ("made",):
        made = renamed(
            documents, (0, "components", "comp-say", "outputDefinitions", kind, next(iter(component)) or path), name
        )
        with pytest.raises(InputError, match="is no name"):
            parse_package(made, "here")


def doubled(documents: list[Any], levels: int, leaf: dict[str, Any]) -> list[Any]:
    """Sub-pipelines of two, one inside the other."""
    made = copy.deepcopy(documents[:1])
    made[0]["deploymentSpec"]["executors"]["exec-tidy"]["container"]["args"] = []
    made[0]["components"] = {"comp-0": leaf}
    for level in range(1, levels + 1):
        task = {"componentRef": {"name": f"comp-{level - 1}"}}
        made[0]["components"][f"comp-{level}"] = {"dag": {"tasks": {"one": task, "two": task}}}
    made[0]["root"] = {"dag": {"tasks": {"all": {"componentRef": {"name": f"comp-{levels}"}}}}}
    return made


def test_what_unfolds_without_end_is_refused_before_it_is_unfolded(documents: list[Any]) -> None:
    leaf = {"executorLabel": "exec-tidy"}
    begun = time.process_time()
    for levels in (10, 40, 49):
        with pytest.raises(InputError, match=f"it holds {2**levels} steps; at most 1000 can run"):
            parse_package(doubled(documents, levels, leaf), "here")
    with pytest.raises(InputError, match="stands inside more than 50"):
        parse_package(doubled(documents, 60, leaf), "here")
    # one that is a step to those who count and a group to those who unfold
    both = doubled(documents, 40, leaf)
    for level in range(1, 41):
        both[0]["components"][f"comp-{level}"]["executorLabel"] = "exec-tidy"
    with pytest.raises(InputError, match="both a container and tasks"):
        parse_package(both, "here")
    many = copy.deepcopy(documents[:1])
    many[0]["root"]["dag"] = {"tasks": {f"t{number}": {"componentRef": {"name": "comp-x"}} for number in range(20_000)}}
    with pytest.raises(InputError, match="it holds 20000 tasks; at most 1000"):
        parse_package(many, "here")
    assert time.process_time() - begun < 20


BOMB = "".join(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 40))
MERGES = "".join(
    f"a{level}: &a{level}\n  <<: [*a{level - 1}, *a{level - 1}]\n  k{level}: 1\n" for level in range(1, 40)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"a0: &a0 [x]\n{BOMB}", r"it uses YAML's aliases.*\*a0"),
        (f"a0: &a0 {{x: y}}\n{MERGES}", "it uses YAML's aliases"),
        ("pipelineInfo: &x\n  y: *x\n", "it uses YAML's aliases"),
        ("[" * 100_000, "not YAML"),
        ("a: " + "{b: " * 5000 + "}" * 5000, "not YAML"),
        ("".join(f"{' ' * depth}a:\n" for depth in range(2000)), "not YAML"),
        ("- " * 50_000, "not YAML"),
        ("? " * 50_000, "not YAML"),
        ("x: !!python/object/apply:os.system ['true']", "not YAML"),
        ("x: !!int '" + "9" * 5000 + "'", "not YAML"),
        ("x: 0x" + "f" * 5000, "a number has more than 1,000 characters"),
        ("x: !!int '0b" + "1" * 50_000 + "'", "a number has more than 1,000 characters"),
        ("x: 1" + ":0" * 1_000_000, "a number has more than 1,000 characters"),
        ("x: 2001-02-30\npipelineInfo: {}", "not YAML"),
        ("\ufffe\x01", "not YAML"),
        ("a\x1b[31m: [\n", "not YAML"),
        ("--- {}\n" * 1000, "not a compiled pipeline"),
        ("pipelineInfo: {}\nschemaVersion: \"2.1\\n\\e[31m\"\n", "here|damaged|schema|neither"),
    ],
    ids=lambda given: None,
)  # fmt: skip
def test_yaml_that_is_a_bomb_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "pipeline.yaml"
    path.write_text(text, encoding="utf-8")
    begun = time.process_time()
    with pytest.raises(InputError, match=message) as refused:
        read_package(path)
    assert str(refused.value).isprintable()
    assert time.process_time() - begun < 20


def test_a_file_without_end_or_of_bytes_or_a_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pipeline.yaml"
    path.write_bytes(b"")
    os.truncate(path, LONGEST + 1)
    with pytest.raises(InputError, match="it has more than 4,194,304 bytes"):
        read_package(path)
    with pytest.raises(InputError, match="more than 4,194,304 bytes"):
        read_package(Path("/dev/zero"))
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InputError, match="not YAML"):
        read_package(path)
    with pytest.raises(InputError, match="Is a directory"):
        read_package(tmp_path)


def test_words_that_look_for_the_end_of_many_placeholders_take_no_time(documents: list[Any]) -> None:
    made = copy.deepcopy(documents)
    made[0]["deploymentSpec"]["executors"]["exec-tidy"]["container"]["args"] = ["{{$" * 30_000]
    begun = time.process_time()
    planned_or_refused(made)
    assert time.process_time() - begun < 20


@pytest.mark.parametrize("words", [["{{$}}"], ["{{$.inputs.parameters['both']}}"], ["{{$.inputs.parameters['one']}}"]])
def test_placeholders_that_stand_for_much_many_times_are_refused(documents: list[Any], words: list[str]) -> None:
    made = copy.deepcopy(documents[:1])
    text = {"parameterType": "STRING"}
    made[0]["components"] = {
        "comp-x": {"executorLabel": "e", "inputDefinitions": {"parameters": {"one": text, "both": text}}}
    }
    made[0]["deploymentSpec"]["executors"] = {"e": {"container": {"image": "i", "command": ["true", *words * 300]}}}
    both = "{{$.inputs.parameters['one']}}" * 30
    given = {"one": {"runtimeValue": {"constant": "x" * 100_000}}, "both": {"runtimeValue": {"constant": both}}}
    made[0]["root"] = {"dag": {"tasks": {"t": {"componentRef": {"name": "comp-x"}, "inputs": {"parameters": given}}}}}
    with pytest.raises(InputError, match="become more than 16,777,216 characters"):
        Plan(parse_package(made, "here"), {}, {}).rehearse()


def test_tasks_that_all_wait_for_each_other_are_put_in_order_at_once(documents: list[Any]) -> None:
    made = copy.deepcopy(documents[:1])
    made[0]["components"] = {"comp-x": {"executorLabel": "exec-tidy"}}
    made[0]["deploymentSpec"]["executors"]["exec-tidy"]["container"]["args"] = []
    before = [f"t{number}" for number in range(1000)]
    tasks = {
        name: {"componentRef": {"name": "comp-x"}, "dependentTasks": before[max(0, number - 50) : number]}
        for number, name in enumerate(before)
    }
    made[0]["root"] = {"dag": {"tasks": dict(reversed(tasks.items()))}}
    begun = time.process_time()
    plan = Plan(parse_package(made, "here"), {}, {})
    assert [node.task.name for node in plan.steps] == before
    assert time.process_time() - begun < 5


def test_steps_of_one_name_and_of_long_names_have_folders_of_their_own(documents: list[Any]) -> None:
    made = copy.deepcopy(documents[:1])
    made[0]["deploymentSpec"]["executors"]["exec-tidy"]["container"]["args"] = []
    made[0]["components"] = {"comp-tidy": {"executorLabel": "exec-tidy"}}
    titles = ["x", "x", "x-2", "x.2", "长" * 66, "长" * 66, "..", "../..", "²1"]
    made[0]["root"] = {
        "dag": {
            "tasks": {
                f"t{number}{'²' * number}": {"componentRef": {"name": "comp-tidy"}, "taskInfo": {"name": title}}
                for number, title in enumerate(titles)
            }
        }
    }
    plan = Plan(parse_package(made, "here"), {}, {})
    folders = [folder_of(node.name) for node in plan.steps]
    assert len(set(folders)) == len(titles)
    assert max(len(folder.encode()) for folder in folders) <= 200


@pytest.mark.slow
def test_on_the_command_line_it_is_one_line_and_2_and_no_file_is_written(documents: list[Any], tmp_path: Path) -> None:
    made = renamed(
        documents, (0, "components", "comp-begin", "outputDefinitions", "artifacts", "made"), "../../../evil"
    )
    package, work = tmp_path / "pipeline.yaml", tmp_path / "a" / "b" / "work"
    package.write_text(yaml.safe_dump_all(made), "utf-8")
    command = [sys.executable, "-m", "pipelines", "run", "--package", str(package), "--work", str(work)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "'../../../evil' is no name of an output" in done.stderr
    assert sorted(tmp_path.iterdir()) == [package]
