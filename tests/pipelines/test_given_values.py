"""Every value that is given is checked when it is given, whether the course uses it or not, as the API server does it
when it makes the pods, hours later."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.adapt_llama import compile_pipeline
from pipelines.configuration import configure, typed_value
from pipelines.machines import check_generation, check_given, fixed_arguments
from pipelines.manifests.check.check import check
from pipelines.manifests.render import as_yaml
from pipelines.settings import SETTINGS
from tests.recordings import scenario, verdicts
from zhllama.errors import InputError
from zhllama.kubernetes.names import option_in
from zhllama.kubernetes.network_policy import S3Network
from zhllama.kubernetes.training_job import TrainingJob
from zhllama.stage.images import image_reference

WHOLE, ADAPTERS = {}, {"start": "adapters"}
"""What a course has: all trainings, or none of them."""


def recorded_values() -> dict[str, tuple[str, Any, bool]]:
    """A recorded pod's id → a setting that says what is different in it, its value, and whether the server took it."""
    good = verdicts()["pod/good"]["object"]
    found = {}
    for name, one in verdicts().items():
        pod = one.get("object") or {}
        if not name.startswith("pod/") or "@" in name or pod.keys() != good.keys():
            continue
        spec, metadata, taken = pod["spec"], pod["metadata"], one["accepted"]
        values = {
            "labels": metadata.get("labels"), "annotations": metadata.get("annotations"),
            "gpu_node_selector": spec.get("nodeSelector"), "gpu_tolerations": spec.get("tolerations"),
        }  # fmt: skip
        was = {"labels": good["metadata"]["labels"]}
        changed = {setting: value for setting, value in values.items() if value and value != was.get(setting)}
        quantities = spec["containers"][0].get("resources", {}) if name.startswith("pod/quantity-") else {}
        for of, usual in (good["spec"]["containers"][0]["resources"] if quantities else {}).items():
            for kind, text in (quantities.get(of) or {}).items():
                if kind in ("cpu", "memory") and text is not None and text != usual[kind]:
                    changed[f"data_{kind}"] = text
        if len(changed) == 1:
            ((setting, value),) = changed.items()
            found[name] = (setting, value, taken)
    return found


RECORDED = recorded_values()


def test_there_are_enough_of_them():
    assert {setting for setting, _, _ in RECORDED.values()} == {
        "labels", "annotations", "gpu_node_selector", "gpu_tolerations", "data_cpu", "data_memory",
    }  # fmt: skip
    assert len(RECORDED) >= 30


@pytest.mark.parametrize("name", RECORDED)
def test_what_the_server_refused_is_refused_and_what_it_took_is_taken(name):
    setting, value, taken = RECORDED[name]
    if taken:
        assert typed_value(setting, value, f"--set {setting}") == (
            value if SETTINGS[setting].kind is not str else str(value)
        )
    else:
        with pytest.raises(InputError, match=rf"^--set {setting}: "):
            typed_value(setting, value, f"--set {setting}")


def test_an_image_that_a_kubelet_refused_is_none():
    specs = [(event.get("object") or {}).get("spec") or {} for event in scenario("image-invalid-name")["events"]]
    (image,) = {one["image"] for spec in specs for one in spec.get("containers", ())}
    assert image_reference(image)
    assert not image_reference(image.lower())


@pytest.mark.parametrize("image", [
    "vllm/vllm-openai:v0.33.0", "registry.example.com:5000/a/b_c/d-e@sha256:" + "a" * 64, "localhost/x", "x",
    "[fd00::1]:5000/x:1", "R.example.com/x", "a/b__c/d---e:T_1",
])  # fmt: skip
def test_an_image_is_taken(image):
    assert image_reference(image) == ""


@pytest.mark.parametrize("image", [
    "Reg/x", "a:b:c", "https://r.example.com/x", "x y", "x:", "x@sha256:12", "/x", "x/", "a//b", "a..b/c..d", "x:-1",
    "中文",
])  # fmt: skip
def test_no_image_is_refused(image):
    assert image_reference(image)


# --- where nobody uses it, too ----------------------------------------------------------------------------------------

WRONG = {
    "training_memory": "256GB",
    "lora_memory": "1e3Gi",
    "serve_memory": "-1Gi",
    "weights_cpu": "two",
    "queue": "GPU_Queue",
    "priority_class": "A",
    "gpu_resource": "nvidia.com/gpu x",
    "sft_gpu_resource": "gpu",
    "lora_nodes": "0",
    "processes_per_node": "0",
    "training_min_nodes": "-1",
    "training_attempts": "0",
    "training_grace_seconds": "-4",
    "lora_deadline_seconds": "0",
    "training_waiting_seconds": "-1",
    "training_starting_seconds": "-1",
    "serve_gpus": "0",
    "serve_replicas": "0",
    "serve_wait_minutes": "0",
    "serve_image": "a:b:c",
    "serve_name": "My_Model",
    "s3_secret": "A_b",
    "pull_secret": "a b",
    "proxy_secret": "-a",
    "ca_config_map": "a_b",
    "generate_secret": "B",
    "serve_secret": "..",
    "training_account": "A",
    "namespace": "a.b",
    "labels": '{"kueue.x-k8s.io/podset-required-topology": "rack"}',
    "step_labels": '{"a": "b c"}',
    "annotations": '{"kueue.x-k8s.io/queue-name": "c"}',
    "step_annotations": '{"a/b/c": "d"}',
    "node_selector": '{"a": 1}',
    "gpu_node_selector": '{"/a": "b"}',
    "tolerations": '[{"key": "a=b"}]',
    "gpu_tolerations": '[{"key": "a", "operator": "Exists", "value": "x"}]',
    "run_as_user": "99999999999",
    "registry": "Reg/x",
    "tag": "a b",
    "evaluation_gpus": "9999999999999999999999",
    "store": "s3://A_b/c",
    "model": "s3:/bucket/model",
    "text": "ftp://a/b",
    "vocab_size": "0",
    "block_size": "-3",
    "validation_fraction": "2",
    "generate_concurrency": "0",
    "generate_base_url": "foo",
    "generate_max_cost": "-1",
    "generate_price_prompt": "-2",
    "generate_price_answer": "-0.5",
    "lora_seed": "-1",
    "sft_seed": "4294967296",
    "lora_weight_decay": "-1",
    "sft_warmup_steps": "-1",
    "lora_save_steps": "-1",
    "lora_learning_rate": "-1",
    "lora_batch": "0",
    "embeddings_deepspeed": "zero9",
    "lora_warmup_steps": "-1",
    "sft_weight_decay": "-0.1",
    "sft_save_steps": "-1",
    "team": "--",
    "training_pods": '{"resources": {"nvidia.com/gpu": "8"}}',
    "lora_pods": '{"resources": {"hugepages-2Mi": "3Mi"}}',
    "sft_pods": '{"resources": {"hugepages-1Gi": "-1Gi"}}',
    "lora_arguments": "--max-steps -2",
    "sft_arguments": '--learning-rate "1',
    "embeddings_arguments": "--store s3://bucket/other",
    "weights": "s3:bucket/model",
    "lora_shared_memory": "9999Gi",
    "training_shared_memory": "9999Gi",
    "serve_shared_memory": "99Ti",
}


@pytest.mark.parametrize("course", [WHOLE, ADAPTERS], ids=["whole", "of adapters"])
@pytest.mark.parametrize(("name", "value"), WRONG.items(), ids=WRONG)
def test_a_wrong_value_is_refused_by_the_name_of_its_setting(name, value, course):
    asked = {**course, name: value}
    if name == "model":
        asked.pop("start", None)
    with pytest.raises(InputError, match=rf"^((?!--set ).)*--set {name}\b"):
        check_given(configure("7b", asked))


@pytest.mark.parametrize(("text", "said"), [
    ("--learning-rate x", "could not convert"),
    ("--max_steps=-2", "--max-steps -2: give a number of steps"),
    ("--store s3://bucket/x", "training option --store: it is launch_training's"),
    ("--weight-decay 0.1 '", '^--set lora_arguments --weight-decay 0.1 \': No closing quotation; quote'),
])  # fmt: skip
def test_an_option_within_a_text_is_named_as_it_stands_there(text, said):
    """Not by a setting, which nobody gave."""
    with pytest.raises(InputError, match=r"^--set lora_arguments") as refusal:
        check_given(configure("7b", {"lora_arguments": text}))
    assert re.search(said, str(refusal.value))
    assert str(refusal.value).count("--set ") == 1


@pytest.mark.parametrize(("asked", "named"), [
    ({}, "generate_base_url"),
    ({"generate_base_url": "http://model/v1"}, "generate_model"),
    ({"generate_base_url": "http://model/v1", "generate_model": "one"}, "generate_items"),
    ({"generate_base_url": "http://model/v1", "generate_model": "one", "generate_max_cost": "5"}, "generate_max_cost"),
])  # fmt: skip
def test_instructions_that_no_model_could_be_asked_for_start_no_run(asked, named):
    told = configure("7b", {"instructions": "generate", **asked})
    # what is only compiled may be told later
    check_given(told)
    with pytest.raises(InputError, match=f"--set {named}"):
        check_generation(told)


@pytest.mark.parametrize("asked", [
    {}, {"import_instructions": "hf://datasets/a/b"},
    {"generate_base_url": "http://model/v1", "generate_model": "one", "generate_items": "5", "generate_batch": "true"},
])  # fmt: skip
def test_instructions_that_are_given_imported_or_wholly_asked_for_are_taken(asked):
    check_generation(configure("7b", asked))


def test_a_model_without_gpus_is_not_served_on_others():
    """The server's own default would ask for them."""
    with pytest.raises(InputError, match="--set gpu_resource: a served model runs on GPUs"):
        check_given(configure("7b", {"gpu_resource": "", "deploy": "kubernetes"}))
    check_given(configure("7b", {"gpu_resource": ""}))


@pytest.mark.parametrize("name", ["warmup_steps", "weight_decay", "save_steps"])
@pytest.mark.parametrize("training", ["embeddings", "lora", "sft"])
def test_a_zero_is_a_value_and_not_left_to_the_size(name, training):
    told = configure("7b", {f"{training}_{name}": "0"})
    assert f"--{name.replace('_', '-')} 0 " in f"{fixed_arguments(told, training)} "


def test_a_pipeline_is_not_compiled_of_a_wrong_value(tmp_path):
    told = configure("7b", {"serve_shared_memory": "99Ti"})
    with pytest.raises(InputError, match="--set serve_shared_memory 99Ti, --set serve_memory"):
        compile_pipeline(told, tmp_path / "p.yaml")
    assert list(tmp_path.iterdir()) == []


def test_every_setting_that_ends_in_a_pod_has_its_check():
    """By their kinds: names, quantities, counts; a new setting of such a name is checked without a word."""
    checked = {name for name in SETTINGS if option_in(name)} | {"run_as_user"}
    words = ("memory", "cpu", "nodes", "secret", "selector", "tolerations", "labels", "annotations", "image", "seconds",
             "queue", "account", "replicas", "gpus", "resource", "storage")  # fmt: skip
    assert {name for name in SETTINGS if name.endswith(words)} <= checked


def test_defaults_of_every_size_are_taken():
    for size in ("tiny", "7b", "13b", "33b", "65b"):
        check_given(configure(size))


GOOD = {
    "text and instructions": {"text": "s3://b/text", "instructions": "s3://b/items.json", "evaluation": "s3://b/exams"},
    "weights of sources": {"text": "s3://bucket/zh:0.9,s3://bucket/en:0.1"},
    "import": {"import_instructions": "hf://datasets/a/b"},
    "a budget in money": {
        "instructions": "generate", "generate_max_cost": "5", "generate_price_prompt": "0.5",
        "generate_price_answer": "1.5", "generate_base_url": "https://models.example.com/v1", "generate_model": "one",
    },
    "a pace alone": {"generate_requests_per_minute": "60", "generate_tokens_per_minute": "1000"},
    "tokens alone": {"generate_max_tokens": "1000000", "generate_batch": "true", "generate_concurrency": "4"},
    "a price alone": {"generate_price_prompt": "0.5"},
    "numbers of the tokenizer": {"vocab_size": "8000", "block_size": "1024", "validation_fraction": "0.1"},
    "data that are cleaned": {"skip_bad": "true", "drop_near_duplicates": "true", "instructions": "s3://b/items.json"},
}  # fmt: skip


@pytest.mark.parametrize("asked", GOOD.values(), ids=GOOD)
def test_good_values_are_taken_in_whatever_company(asked):
    """A value is tried by the stage that takes it, beside others that it goes with there."""
    check_given(configure("tiny", asked))


# --- what is taken, the server takes ----------------------------------------------------------------------------------

TEXTS = st.text(st.sampled_from("aZ09-_./: \t中"), max_size=8)
VALUES = {
    "queue": TEXTS, "memory": st.from_regex(r"[0-9.]{1,3}([eE]-?[0-9])?(m|k|K|Ki|G|Gi|GB| )?", fullmatch=True),
    "node_selector": st.dictionaries(TEXTS, TEXTS, max_size=2), "labels": st.dictionaries(TEXTS, TEXTS, max_size=2),
    "annotations": st.dictionaries(TEXTS, TEXTS, max_size=2), "pull_secret": TEXTS,
    "tolerations": st.lists(st.fixed_dictionaries({}, optional={
        "key": TEXTS, "operator": st.sampled_from(["Exists", "Equal", "In"]), "value": TEXTS,
        "effect": st.sampled_from(["NoExecute", "NoSchedule", "Never"]), "tolerationSeconds": st.integers(-1, 3),
    }), max_size=2),
}  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(sorted(VALUES)).flatmap(lambda name: st.tuples(st.just(name), VALUES[name])))
def test_of_what_is_taken_check_finds_nothing_that_the_server_refuses(tmp_path: Path, one: tuple[str, Any]):
    """`check` is held against the recorded verdicts; here it looks at the job that is made of the value."""
    name, value = one
    value = tuple(value) if name == "tolerations" else value
    try:
        job = TrainingJob(
            name="j", command=("true",), image="x:1", deadline_seconds=60, shared_memory="0", **{name: value}
        )
    except InputError:
        return
    path = tmp_path / "job.yaml"
    path.write_text(as_yaml(job, "pytorchjob", S3Network()), encoding="utf-8")
    assert [one.message for one in check([path], None) if one.counts_at("admission")] == []


@pytest.mark.parametrize(("name", "value", "said"), [
    ("prompt", "\udcff", "no text"),
    ("store", "s3://bucket/a\0b", "no text"),
    ("annotations", '{"a/b": "\\ud800"}', "JSON"),
    ("annotations", {"a/b": "\ud800"}, "no text"),
    ("labels", '{"a": "b", "a": "c"}', "JSON"),
    ("tolerations", [{"key": "\udcff", "operator": "Exists"}], "no text"),
])  # fmt: skip
def test_what_no_file_can_hold_is_refused_by_its_name(name, value, said):
    """Bytes of a shell that are no UTF-8, halves of characters, a name that is there twice."""
    with pytest.raises(InputError, match=rf"^--set {name}: .*{said}"):
        typed_value(name, value, f"--set {name}")
