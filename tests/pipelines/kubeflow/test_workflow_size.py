"""The size of a run's Workflow, computed from the compiled pipeline: held against what real runs came to."""

import copy
import json
import re

import pytest
import yaml
from kfp import dsl, kubernetes

from tests.pipelines.kubeflow.recorded_package import NESTED, SKIPPED, recorded, recorded_package, without_branches
from tests.pipelines.kubeflow.step_texts import Source
from tests.pipelines.kubeflow.workflow_size import LIMIT, _Nodes, workflow_bytes
from zhllama.errors import InputError

ARGUMENTS = {"store": "s3://zhllama/artifacts", "weights": "s3://zhllama/weights"}


FLAT, CANCELLED = recorded("flat-succeeded"), recorded("cancelled")


@pytest.fixture(scope="module")
def package():
    return recorded_package()


def size(documents):
    return workflow_bytes(yaml.dump_all(documents, Dumper=yaml.CSafeDumper), ARGUMENTS)


@pytest.fixture(scope="module")
def whole(package):
    return size(package)


@pytest.fixture(scope="module")
def ran(package):
    """Without what stands in the branches that were not taken; a skipped group has one node, an empty one two."""
    documents = copy.deepcopy(package)
    for name in SKIPPED:
        documents[0]["components"][name]["dag"]["tasks"] = {}
    return size(documents)


def test_the_specification_has_the_arguments_templates_and_bytes_of_the_recorded_one(whole):
    """Recorded: 720 kB, 125 arguments, 54 templates."""
    assert (whole.arguments, whole.templates) == (125, 54)
    assert whole.spec == pytest.approx(720_000, rel=0.03)


def test_a_whole_run_is_stored_in_as_many_bytes_as_the_recorded_one(whole, ran):
    assert ran.node_count - len(SKIPPED) == len(NESTED["nodes"]) == 248
    assert ran.total > LIMIT
    assert NESTED["compressed"]
    assert whole.spec + ran.compressed_nodes == pytest.approx(NESTED["bytes"], rel=0.1)


def test_the_texts_of_a_training_are_those_that_were_measured(whole):
    """Recorded, in kB: component 4.4, task 4.3, container 4.0 (names of images were longer), the pod's patch 12.4."""
    training = whole.input_text("launch-training-2")
    assert training is whole.tasks["exit-handler-1/condition-branches-35/condition-38/launch-training-2"]
    assert training.component == pytest.approx(4400, rel=0.05)
    assert training.task == pytest.approx(4300, rel=0.05)
    assert training.container == pytest.approx(4000, rel=0.05)
    assert training.pod_spec_patch == pytest.approx(12_400, rel=0.05)
    assert training.driver == training.component + training.task + training.container + training.kubernetes
    assert training.most == max(training.driver, training.pod_spec_patch) > 12_000


def test_the_same_course_without_branches_is_as_small_as_it_was(package):
    """Recorded: a specification of 210 kB, 120 nodes. The graph is rebuilt here, so that it is not quite the same."""
    flat = size(without_branches(package))
    assert flat.node_count == len(FLAT["nodes"]) == 120
    assert flat.spec == pytest.approx(210_000, rel=0.05)
    assert flat.spec + flat.compressed_nodes == pytest.approx(FLAT["bytes"], rel=0.12)


def test_nodes_that_are_not_compressed_take_what_they_took(package):
    """A run that was cancelled below the limit: nine steps had run, the nodes of nine others say `omitted`."""
    assert not CANCELLED["compressed"]
    pods = [node for node in CANCELLED["nodes"] if node["type"] == "Pod" and "executor" in node["displayName"]]
    wanted: dict[str, int] = {}
    for node in pods:
        kind = re.sub(r"-\d+$", "", node["name"].split(".")[-2].removesuffix("(0)"))
        wanted[kind] = wanted.get(kind, 0) + 1
    assert sum(wanted.values()) == 9
    part = size(without_branches(package, wanted))
    omitted = [node for node in CANCELLED["nodes"] if node["type"] == "Skipped"]
    assert part.node_count + len(omitted) == len(CANCELLED["nodes"])
    whole = size(without_branches(package)).spec + part.nodes + len(json.dumps(omitted))
    assert whole == pytest.approx(CANCELLED["bytes"], rel=0.1)


# --- the nodes --------------------------------------------------------------------------------------------------------


def labelled(task):
    for name in ("one", "two", "three"):
        kubernetes.add_pod_label(task, f"zhllama.io/{name}", "x")
    return task


def test_the_nodes_have_the_names_types_and_templates_that_argo_gave_them(compiled):
    name = FLAT["metadata"]["name"]
    steps = [
        found[1]
        for node in FLAT["nodes"]
        if (found := re.search(r"exit-handler-1\(0\)\.([a-z0-9-]+)-driver$", node["name"]))
    ]
    kinds = {kind: component(kind) for kind in {re.sub(r"-\d+$", "", step) for step in steps}}
    cleanup = component("cleanup-training")

    @dsl.pipeline(name="adapt-llama")
    def pipeline():
        with dsl.ExitHandler(labelled(cleanup())):
            for step in sorted(steps):
                labelled(kinds[re.sub(r"-\d+$", "", step)]())

    path = compiled(pipeline)
    found = _Nodes(Source(list(yaml.safe_load_all(path.read_text())), {})).whole()
    told = {(node["name"].partition("(0)")[2], node["type"], node["templateName"]) for node in found}
    assert told == {
        (node["name"].removeprefix(name).removeprefix("(0)"), node["type"], node["templateName"])
        for node in FLAT["nodes"]
    }


def component(kind):
    def step():
        return dsl.ContainerSpec(image="none", command=["step"])

    step.__name__ = kind.replace("-", "_")
    return dsl.container_component(step)


def test_an_input_more_is_paid_for_in_every_node(compiled):
    @dsl.container_component
    def say(value: str):
        return dsl.ContainerSpec(image="none", command=["say"], args=[value])

    @dsl.pipeline(name="test")
    def pipeline(value: str = ""):
        say(value=value)

    path = compiled(pipeline)
    short, long = workflow_bytes(path, {"value": "a"}), workflow_bytes(path, {"value": "a" * 1001})
    # in the specification and the root's two drivers once; in the patch twice: four nodes' input, two nodes' output
    assert long.spec - short.spec == 1000
    assert long.nodes - short.nodes == 2 * 1000 + 6 * 2 * 1000
    assert long.tasks["say"].pod_spec_patch - short.tasks["say"].pod_spec_patch == 2000
    assert (long.tasks["say"].driver, long.tasks["say"].inputs) == (short.tasks["say"].driver, 1)
    assert (long.executors, long.node_count, long.total) == (1, 12, long.spec + long.nodes)


def test_what_is_stored_is_compressed_from_argos_limit_on(whole, ran):
    assert whole.total > LIMIT
    assert whole.stored == whole.spec + whole.compressed_nodes < whole.total


def test_what_is_no_pipeline_is_refused():
    with pytest.raises(InputError, match="not a compiled pipeline"):
        workflow_bytes("a: 1", {})
