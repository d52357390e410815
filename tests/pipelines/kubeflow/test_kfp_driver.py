"""The local runner resolves a step's command as KFP 2.17.0's driver and launcher do: held against kfp_driver.py."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kfp import dsl

from pipelines.local.ir import parse_package
from pipelines.local.placeholders import Surroundings, driver_text_of, text_of
from pipelines.local.plan import Ended, Plan, Snapshot
from tests.pipelines.kubeflow import kfp_driver
from tests.pipelines.kubeflow.kfp_driver import DriverError, resolve_all, resolve_documents, unpassed
from tests.pipelines.kubeflow.recorded_package import PACKAGE, recorded_package, without_branches
from zhllama.errors import InputError


def local_words(documents, arguments, run="run-id"):
    """What the local runner would start, step by step, with the outputs that the driver's double stands in."""
    package = parse_package(documents, "here")
    job = {"pipeline_job_uuid": run, "pipeline_job_name": "run name", "pipeline_job_resource_name": "run-resource"}
    plan = Plan(package, arguments, job)
    plan.rehearse()
    ended = {
        node.path: Ended(
            True,
            {name: kfp_driver.STAND_INS[kind] for name, kind in node.component.output_parameters.items()},
            {name: f"/out/{name}" for name in node.component.output_artifacts},
        )
        for node in plan.steps
    }
    moment = Snapshot(plan, ended)
    found = {}
    for node in plan.steps:
        parameters, artifacts = moment.inputs(node.path)
        where = "/".join(name for name in node.path if not name.startswith("exit-handler-"))
        around = Surroundings(
            parameters,
            {name: f"/in/{name}" for name in artifacts},
            {name: f"/{where}/{name}" for name in node.component.output_parameters},
            {name: f"/{where}/{name}" for name in node.component.output_artifacts},
            f"/{where}/executor_output.json",
        )
        found[where] = plan.words(node, around)
    return found


# --- values -----------------------------------------------------------------------------------------------------------

numbers = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False), st.integers(-(2**53), 2**53).map(float), st.integers(-9, 9)
)
leaves = st.one_of(numbers, st.booleans(), st.text(), st.none())
json_values = st.recursive(leaves, lambda of: st.lists(of, max_size=3) | st.dictionaries(st.text(max_size=3), of))


@pytest.mark.slow
@given(st.one_of(numbers, st.booleans(), st.text(), st.lists(json_values), st.dictionaries(st.text(), json_values)))
def test_both_programs_write_every_value_as_the_runner_does(value):
    assert driver_text_of(value) == kfp_driver.driver_text(value)
    assert text_of(value) == kfp_driver.launcher_text(value)


@pytest.mark.parametrize(
    ("value", "driver", "launcher"),
    [(1e-5, "1e-05", "0.00001"), (2e-4, "0.0002", "0.0002"), (1234567.5, "1.2345675e+06", "1234567.5"),
     (3.0, "3", "3"), (1e22, "1e+22", "10000000000000000000000"), ({"a": 1e-7}, '{"a":1e-7}', '{"a":1e-7}')],
)  # fmt: skip
def test_the_two_programs_write_numbers_each_its_own_way(value, driver, launcher):
    assert (kfp_driver.driver_text(value), kfp_driver.launcher_text(value)) == (driver, launcher)


# --- random pipelines -------------------------------------------------------------------------------------------------

KINDS = {
    "STRING": st.text(alphabet="ab熊 '\"\\<", max_size=5),
    "NUMBER_INTEGER": st.integers(-(10**7), 10**7).map(float),
    "NUMBER_DOUBLE": st.floats(-1e8, 1e8, allow_nan=False),
    "BOOLEAN": st.booleans(),
    "LIST": st.lists(st.one_of(st.floats(-10, 10), st.text(max_size=2)), max_size=2),
    "STRUCT": st.dictionaries(st.text(max_size=2), st.booleans(), max_size=2),
}
INPUTS = ("a", "b", "c", "d")


def parameter(name):
    return f"{{{{$.inputs.parameters['{name}']}}}}"


@st.composite
def words_of_commands(draw):
    parts = [parameter(name) for name in INPUTS] + ["--flag", "x=", "", "{{$.outputs.parameters['ref'].output_file}}"]
    parts += ["{{$.outputs.output_file}}", "{{$.inputs.artifacts['in'].path}}", "{{$.outputs.artifacts['out'].uri}}"]
    texts = st.lists(st.sampled_from(parts), min_size=1, max_size=3).map("".join)
    if draw(st.integers(0, 3)):
        return draw(texts)
    inner = st.one_of(texts, st.lists(texts, max_size=2))
    choice = {"InputName": draw(st.sampled_from([*INPUTS, "in"])), "Then": draw(inner)}
    if draw(st.booleans()):
        choice["Else"] = draw(inner)
    return json.dumps({"IfPresent": choice})


@st.composite
def pipelines(draw):
    """One step (in a group or not), its inputs passed or not, as constants, arguments, outputs or texts of others."""
    kinds = {name: draw(st.sampled_from([*KINDS])) for name in INPUTS}
    declared, arguments, root, passed = {}, {}, {}, {}
    for name, kind in kinds.items():
        declared[name] = {"parameterType": kind}
        if draw(st.integers(0, 2)) == 0:
            declared[name] |= {"isOptional": True}
            if draw(st.booleans()):
                declared[name] |= {"defaultValue": draw(KINDS[kind])}
        how = draw(st.sampled_from(["constant", "argument", "argument", "null", "output", "text", "nothing"]))
        if how == "constant":
            passed[name] = {"runtimeValue": {"constant": draw(KINDS[kind])}}
        if how in ("argument", "null"):
            root[name] = {"parameterType": kind, "isOptional": True}
            passed[name] = {"componentInputParameter": name}
        if how == "argument":
            arguments[name] = draw(KINDS[draw(st.sampled_from([kind, kind, kind, "STRING", "NUMBER_DOUBLE"]))])
        if how == "output":
            passed[name] = {"taskOutputParameter": {"producerTask": "before", "outputParameterKey": kind.lower()}}
        if how == "text":
            text = st.lists(st.sampled_from([*map(parameter, INPUTS), "<", "{{$.pipeline_job_uuid}}"]), max_size=2)
            passed[name] = {"runtimeValue": {"constant": draw(text.map("".join))}}
    artifact = {"artifactType": {"schemaTitle": "system.Artifact"}}
    outputs = {"parameters": {"ref": {"parameterType": "STRING"}}, "artifacts": {"out": artifact}}
    words = draw(st.lists(words_of_commands(), min_size=1, max_size=3))
    source = {"taskOutputArtifact": {"producerTask": "before", "outputArtifactKey": "out"}}
    spec = {
        "pipelineInfo": {"name": "random"}, "schemaVersion": "2.1.0",
        "deploymentSpec": {"executors": {
            "exec-step": {"container": {"image": "none", "command": ["step"], "args": words}},
            "exec-before": {"container": {"image": "none", "command": ["before"]}},
        }},
        "components": {
            "comp-step": {"executorLabel": "exec-step", "outputDefinitions": outputs,
                          "inputDefinitions": {"parameters": declared, "artifacts": {"in": artifact}}},
            "comp-before": {"executorLabel": "exec-before", "outputDefinitions": {"artifacts": {"out": artifact},
                "parameters": {kind.lower(): {"parameterType": kind} for kind in KINDS}}},
        },
        "root": {"inputDefinitions": {"parameters": root}, "dag": {"tasks": {
            "before": {"componentRef": {"name": "comp-before"}, "taskInfo": {"name": "before"}},
            "step": {"componentRef": {"name": "comp-step"}, "taskInfo": {"name": "step"}, "dependentTasks": ["before"],
                     "inputs": {"parameters": passed, "artifacts": {"in": source}}},
        }}},
    }  # fmt: skip
    return [spec], {**dict.fromkeys(root), **arguments}


def outcome(resolve, documents, arguments):
    """The words, and the reason where there are none."""
    try:
        return resolve(documents, arguments), ""
    except (InputError, DriverError) as error:
        return None, str(error)


STRICTER = ("it passes nothing", "as it stands", "would take for a placeholder", "it uses {{$", "which there is not")
"""What no word names has to be passed and be right too, and there is no text in which an order could decide."""


@given(pipelines())
def test_what_the_runner_starts_is_what_a_cluster_would_start(case):
    expected, _ = outcome(resolve_documents, *case)
    words, reason = outcome(local_words, *case)
    if words is not None or not any(known in reason for known in STRICTER):
        assert words == expected


# --- whole pipelines --------------------------------------------------------------------------------------------------


@dsl.container_component
def told(value: str, rate: float, ref: dsl.OutputPath(str), again: str = "by default"):
    words = ["--value", value, "--rate", rate, "--again", again, "--reference", ref]
    return dsl.ContainerSpec(image="none", command=["tell"], args=words)


def test_a_sub_pipeline_in_an_exit_handler_is_resolved_alike(compiled):
    @dsl.pipeline
    def inner(value: str, rate: float = 2e-5) -> str:
        return told(value=value, rate=rate, again=f"{rate} of {value}").output

    @dsl.pipeline(name="outer")
    def outer(value: str, rate: float = 1e-5):
        with dsl.ExitHandler(told(value=dsl.PIPELINE_JOB_ID_PLACEHOLDER, rate=1.0, again="bye")):
            first = told(value=value, rate=rate, again="a")
            inner(value=first.output)

    path = compiled(outer)
    expected = resolve_all(path, {"value": "熊"})
    documents = list(kfp_driver.yaml.safe_load_all(path.read_text()))
    assert local_words(documents, {"value": "熊", "rate": 1e-5}) == expected
    assert unpassed(path) == []
    assert expected["told"][1:7] == ["--value", "run-id", "--rate", "1", "--again", "bye"]
    assert expected["told-2"][1:5] == ["--value", "熊", "--rate", "1e-05"]
    assert expected["inner/told"][1:7] == [
        "--value",
        "s3://b/made",
        "--rate",
        "2e-05",
        "--again",
        "0.00002 of s3://b/made",
    ]


def test_the_first_run_on_a_real_cluster_failed_as_the_double_says(tmp_path):
    """Recorded: `failed to resolve input parameters: parameter "max_positions" not found in executor input`, and 73
    inputs of 18 tasks that had to be passed before that pipeline ran."""
    path = tmp_path / "pipeline.yaml"
    path.write_bytes(gzip.decompress(PACKAGE.read_bytes()))
    missing = unpassed(path)
    assert (len(missing), len({one.split(":")[0] for one in missing})) == (73, 18)
    assert "convert-weights: max_positions" in missing
    with pytest.raises(DriverError, match=r'failed to resolve input parameters: parameter "\w+" not found in executor'):
        resolve_all(path, {"store": "s3://b/a", "weights": "s3://b/w"})


def test_every_command_of_the_course_without_branches_is_the_one_that_a_cluster_starts():
    documents = without_branches(recorded_package())
    given = documents[0]["root"]["inputDefinitions"]["parameters"]
    arguments = {name: one.get("defaultValue") for name, one in given.items()} | {
        "store": "s3://b/a",
        "weights": "s3://b/w",
    }
    expected, found = resolve_documents(documents, arguments), local_words(documents, arguments)
    assert len(expected) == 18
    assert list(expected) == sorted(found)
    for step, words in expected.items():
        assert len(words) == len(found[step])
        for word, local in zip(words, found[step]):
            # {{$}}: the same values, whatever the order of the rest
            whole = word.startswith('{"inputs"')
            assert (json.loads(local)["inputs"]["parameterValues"] if whole else local) == (
                json.loads(word)["inputs"]["parameterValues"] if whole else word
            )


@pytest.mark.parametrize(("secret", "message"), [("", "Expected a non-empty string"), ("s3", "")])
def test_a_secret_without_a_name_is_the_drivers_error(compiled, secret, message):
    from kfp import kubernetes

    @dsl.pipeline(name="outer")
    def outer(secret: str):
        task = told(value="a", rate=1.0, again="b")
        kubernetes.use_secret_as_env(task, secret, {"key": "KEY"})

    path = compiled(outer)
    if not message:
        assert resolve_all(path, {"secret": secret})["told"][0] == "tell"
        return
    with pytest.raises(DriverError, match=message):
        resolve_all(path, {"secret": secret})


def test_resources_are_texts_among_the_inputs(compiled):
    @dsl.pipeline(name="outer")
    def outer(cpu: str):
        told(value="a", rate=1.0, again="b").set_cpu_limit(cpu)

    path = compiled(outer)
    assert "told" in resolve_all(path, {"cpu": "2"})
    with pytest.raises(DriverError, match="is not a text among its inputs: 2"):
        resolve_all(path, {"cpu": 2})
