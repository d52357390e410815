"""What may run when: on random graphs, by simulation; and what people call the steps."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.local.ir import Component, FromTask, Package, Parameter, Task
from pipelines.local.plan import SETTLED, Ended, Plan, Snapshot, State, checked_arguments
from zhllama.errors import InputError

STEP = Component("comp-step", {}, (), {"ref": "STRING"}, (), ("python",), {}, {})


def task(name, after=(), always=False, component="comp-step", **parameters):
    return Task(name, name, component, parameters, {}, tuple(after), always)


def package(*tasks, **components):
    root = Component("root", {}, (), {}, (), (), {item.name: item for item in tasks}, {})
    return Package("test", root, {"comp-step": STEP, **components})


def graph(name, *tasks):
    return Component(name, {}, (), {}, (), (), {item.name: item for item in tasks}, {})


@st.composite
def pipelines(draw):
    """Up to eight tasks, each waiting for some before it; some are groups, and an exit handler."""
    count = draw(st.integers(1, 8))
    tasks, components = [], {}
    for index in range(count):
        after = draw(st.sets(st.integers(0, index - 1), max_size=3)) if index else set()
        component = "comp-step"
        if draw(st.integers(0, 3)) == 0:
            component = f"comp-group-{index}"
            components[component] = graph(component, task("first"), task("second", after=["first"]))
        tasks.append(task(f"t{index}", [f"t{other}" for other in after], component=component))
    tasks.append(task("finally", [f"t{index}" for index in range(count)], always=True))
    return package(*tasks, **components)


def simulate(plan, order, failing=frozenset(), parallel=2):
    """Runs a plan step by step; returns the steps in the order they started, and the final states."""
    ended, running, started = {}, [], []
    while True:
        ready = [path for path, state in Snapshot(plan, ended, running).states.items() if state is State.READY]
        while ready and len(running) < parallel:
            path = ready.pop(order.randrange(len(ready)))
            running.append(path)
            started.append((path, frozenset(ended)))
        if not running:
            return started, Snapshot(plan, ended).states
        path = running.pop(order.randrange(len(running)))
        ended[path] = Ended(path not in failing, {"ref": str(path)})


@given(pipelines(), st.integers())
def test_a_step_starts_after_all_that_it_waits_for_and_everything_is_settled(spec, seed):
    plan = Plan(spec, {}, {})
    started, states = simulate(plan, random.Random(seed))
    assert set(states.values()) <= SETTLED
    names = [path for path, _ in started]
    assert len(names) == len(set(names))
    for path, before in started:
        needed = {step for step in plan.before(path) if states[step] is State.DONE}
        assert needed <= before
    assert names[-1] == ("finally",)


@given(pipelines(), st.integers(), st.data())
def test_after_a_failure_nothing_new_starts_but_the_exit_handler(spec, seed, data):
    plan = Plan(spec, {}, {})
    failing = data.draw(st.sampled_from([node.path for node in plan.steps]))
    started, states = simulate(plan, random.Random(seed), frozenset({failing}))
    assert set(states.values()) <= SETTLED
    assert started[-1][0] == ("finally",)
    for path, before in started:
        assert failing not in before or path == ("finally",)


@given(pipelines(), st.data())
def test_until_runs_a_step_and_what_it_needs_and_no_other(spec, data):
    plan = Plan(spec, {}, {})
    target = data.draw(st.sampled_from([node for node in plan.steps if node.path != ("finally",)]))
    needed = plan.before(target.path) | {target.path}
    plan.until([target])
    started, states = simulate(plan, random.Random(0))
    assert {path for path, _ in started} <= needed | {("finally",)}
    assert states[target.path] is State.DONE


def test_an_output_of_a_sub_pipeline_is_that_of_the_step_in_it():
    inner = Component(
        "comp-inner",
        {},
        (),
        {"one": "STRING"},
        (),
        (),
        {"a": task("a"), "b": task("b")},
        {"one": FromTask("b", "ref")},
    )
    spec = package(
        task("inner", component="comp-inner"),
        task("after", value=FromTask("inner", "one")),
        **{"comp-inner": inner},
    )
    ended = {("inner", "a"): Ended(True, {"ref": "of a"}), ("inner", "b"): Ended(True, {"ref": "of b"})}
    moment = Snapshot(Plan(spec, {}, {}), ended)
    assert moment.states[("after",)] is State.READY
    assert moment.inputs(("after",))[0]["value"] == "of b"


def test_a_circle_is_refused():
    with pytest.raises(InputError, match="a, b wait for each other"):
        Plan(package(task("a", ["b"]), task("b", ["a"])), {}, {})


def test_steps_of_one_title_get_the_name_of_their_sub_pipeline():
    spec = package(
        task("stage-2", component="comp-g"), task("sft", component="comp-h"), task("merge"), task("evaluate"),
        **{"comp-g": graph("comp-g", task("merge")), "comp-h": graph("comp-h", task("merge"))},
    )  # fmt: skip
    plan = Plan(spec, {}, {})
    assert {node.path: node.name for node in plan.steps} == {
        ("stage-2", "merge"): "stage-2/merge",
        ("sft", "merge"): "sft/merge",
        ("merge",): "merge",
        ("evaluate",): "evaluate",
    }


def test_an_unknown_step_is_refused_with_the_nearest():
    plan = Plan(package(task("train_tokenizer"), task("evaluate")), {}, {})
    assert plan.named("train-tokenizer", "--until")[0].path == ("train_tokenizer",)
    with pytest.raises(
        InputError, match=r"--until train_tokeniser: .* \(did you mean train_tokenizer\?\); the steps are"
    ):
        plan.named("train_tokeniser", "--until")


PARAMETERS = {
    "store": Parameter("STRING"),
    "steps": Parameter("NUMBER_INTEGER", 3.0, True),
    "flag": Parameter("BOOLEAN", True, True),
}
ARGUED = Package("test", Component("root", PARAMETERS, (), {}, (), (), {"t": task("t")}, {}), {"comp-step": STEP})


def test_arguments_are_typed_and_defaults_filled_in():
    assert checked_arguments(ARGUED, {"store": "a", "flag": "false"}) == {"store": "a", "steps": 3.0, "flag": False}


@pytest.mark.parametrize(
    ("given_arguments", "message"),
    [
        ({"store": "a", "stepz": "1"}, r"--set stepz: the pipeline has no such parameter \(did you mean steps\?\)"),
        ({}, "parameter store has no value; give it with --set store=…"),
        ({"store": "a", "steps": "many"}, "--set steps: 'many' where a whole number is needed"),
        ({"store": "a", "flag": "maybe"}, "--set flag: 'maybe' where true or false is needed"),
    ],
)
def test_a_wrong_argument_is_refused(given_arguments, message):
    with pytest.raises(InputError, match=message):
        checked_arguments(ARGUED, given_arguments)
