"""What a plan says of work, storage and nodes, and what it would take to fit."""

import dataclasses
import functools
import shlex

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipelines import sizes
from pipelines.planner.estimate import PlanRequest, plan, serving_plan
from pipelines.planner.gpus import FILE, gpu_of, gpus
from pipelines.planner.remedies import remedies, warnings
from zhllama.errors import InputError

GIANTS = ("7b", "13b", "33b", "65b")
KINDS = list(gpus().values())


load = functools.cache(sizes.load)


def request(size: str, gpu: str = "h100-80gb", **more) -> PlanRequest:
    return PlanRequest(size=load(size), gpu={kind.name: kind for kind in KINDS}[gpu], **more)


# --- the sizes fit what their files name ------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", sizes.STAGES)
@pytest.mark.parametrize(
    ("size", "gpu"), [("7b", "a10-24gb"), ("13b", "a100-40gb"), ("33b", "a100-80gb"), ("65b", "h200-141gb")]
)
def test_each_size_fits_the_cards_that_its_file_speaks_of_and_gives_its_nodes_enough(size, gpu, stage):
    asked = request(size, gpu)
    made = plan(stage, asked)
    assert made.fits, f"{made.needed:,} of {made.gpu.memory:,}: {made.phase}"
    if size != "7b":
        # what a day on another kind costs in time is another matter
        assert warnings(made, asked.size) == []


def test_65b_does_not_fit_80_gb_under_zero2_and_zero3_is_the_first_remedy():
    asked = request("65b", nodes=1, gpus_per_node=8)
    made = plan("lora", asked)
    assert not made.fits
    assert made.phase.parts["weights"] > 130e9
    first, *others = remedies([made], asked, KINDS)
    assert "--deepspeed zero3" in first
    assert any("h200-141gb" in other for other in others)


@pytest.mark.parametrize("size", GIANTS)
@pytest.mark.parametrize("gpu", [kind.name for kind in KINDS])
def test_every_remedy_makes_it_fit(size, gpu):
    asked = request(size, gpu, arguments="--gradient-checkpointing false")
    short = [made for made in (plan(stage, asked) for stage in sizes.STAGES) if not made.fits]
    if not short:
        assert plan("lora", asked).fits
        return
    found = remedies(short, asked, KINDS)
    assert found
    for remedy in found:
        words = shlex.split(remedy.rsplit(" (", 1)[0])
        given = dict(zip(words[::2], words[1::2], strict=True))
        changed = dataclasses.replace(
            asked,
            gpu=gpu_of(given["--gpu"]) if "--gpu" in given else asked.gpu,
            nodes=int(given.get("--nodes", 0)),
            arguments=f"{asked.arguments} {given.get('--arguments', '')}",
        )
        for made in short:
            assert plan(made.stage, changed).fits
            assert plan(made.stage, changed).tokens_per_step >= made.tokens_per_step


def test_a_remedy_is_not_given_twice_with_more():
    asked = request("65b")
    short = [plan(stage, asked) for stage in sizes.STAGES]
    assert sum("zero3" in remedy for remedy in remedies(short, asked, KINDS)) == 1


# --- work -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "tokens"), [("embeddings", 1024 * 512), ("lora", 1024 * 512), ("sft", 512 * 512)])
def test_a_step_is_the_recipes_global_batch(stage, tokens):
    assert plan(stage, request("7b")).tokens_per_step == tokens


def test_the_recipes_own_training_takes_as_long_as_it_says_at_the_share_that_it_had():
    # 16 A100s, batch 1024, 512 tokens: about 6 hours for 1000 steps
    made = plan("lora", request("7b", "a100-80gb", nodes=2, gpus_per_node=8, steps=1000, mfu=0.13))
    assert made.seconds == pytest.approx(6 * 3600, rel=0.05)


@pytest.mark.parametrize(("length", "seconds"), [(512, 1.5), (1024, 2.8)])
def test_the_assumed_share_is_what_was_published_of_an_a100(length, seconds):
    # Qwen-7B's README: LoRA on one A100, 8 passes of one sequence, recomputed activations
    work = 4 * 6.5e9 + 4 * 151_936 * 4096
    gpu = gpu_of("a100-80gb")
    assert 8 * length * work / (gpu.tflops * 1e12 * gpu.mfu) == pytest.approx(seconds, rel=0.15)


def test_twice_the_gpus_take_half_the_time_for_the_same_steps():
    one, two = (plan("lora", request("13b", nodes=nodes)) for nodes in (1, 2))
    assert two.tokens == 2 * one.tokens
    assert two.seconds == pytest.approx(one.seconds)
    assert two.tokens_per_second == pytest.approx(2 * one.tokens_per_second)


def test_recomputing_costs_time():
    with_it, without = (
        plan("lora", request("7b", "a100-80gb", arguments=f"--gradient-checkpointing {given}"))
        for given in (True, False)
    )
    assert with_it.seconds > 1.2 * without.seconds
    assert with_it.phase.total < without.phase.total


# --- storage ----------------------------------------------------------------------------------------------------------


def test_what_lies_in_s3_follows_from_the_parameters():
    made = plan("lora", request("7b", pieces=49_953))
    trained, base = 429_203_456, 6_885_486_592
    assert made.artifact == pytest.approx(2 * trained, rel=0.01)
    # bfloat16 weights, float32 masters, two moments
    assert made.checkpoint == 14 * trained
    # 6000 steps, one every 500, none of the last
    assert made.checkpoint_count == 11
    assert made.s3_kept == made.artifact + 3 * made.checkpoint
    # two nodes read the model and the dataset
    dataset = made.tokens * 2 * (1 + 6 / 512)
    assert made.s3_read == pytest.approx(2 * (2 * base + dataset), rel=1e-3)
    assert made.ephemeral > made.s3_read / 2 + 2 * trained
    stage_1 = plan("embeddings", request("7b", pieces=49_953))
    assert stage_1.artifact == pytest.approx(2 * base, rel=1e-3)
    assert stage_1.s3_written - stage_1.checkpoint_count * stage_1.checkpoint < 0.1 * stage_1.artifact


def test_a_dataset_takes_two_bytes_a_token_up_to_65536_pieces():
    few, many, none = (
        plan("lora", request("7b", pieces=pieces, data_tokens=tokens)).s3_read / 2
        for pieces, tokens in ((65_536, 10**9), (65_537, 10**9), (65_536, 1))
    )
    assert few - none == pytest.approx(2e9, rel=0.02)
    assert many - none == pytest.approx(4e9, rel=0.02)


def test_a_node_that_has_too_little_is_named_with_its_field():
    size = sizes.load("7b")
    small = dataclasses.replace(size, lora=dataclasses.replace(size.lora, memory="64Gi", ephemeral_storage="8Gi"))
    found = warnings(plan("lora", request("7b")), small)
    assert [line.split(" of a node")[0] for line in found] == ["lora: memory", "lora: ephemeral_storage"]


# --- serving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "gpu"), [("7b", "a10-24gb"), ("13b", "a100-40gb"), ("33b", "l40s-48gb"), ("65b", "l40s-48gb")]
)
def test_each_size_is_served_on_what_its_file_says(size, gpu):
    made = serving_plan(request(size, gpu), concurrency=1)
    assert made.fits
    assert made.most >= 1


def test_the_cache_of_a_token_of_7b_is_half_a_megabyte():
    assert serving_plan(request("7b"), context=1, concurrency=1).cache == 2 * 32 * 4096 * 2


@given(st.sampled_from(GIANTS), st.sampled_from([kind.name for kind in KINDS]), st.integers(256, 4096))
def test_as_many_requests_as_it_says_fit_and_not_one_more(size, gpu, context):
    most = serving_plan(request(size, gpu), context=context).most
    assert not serving_plan(request(size, gpu), context=context, concurrency=most + 1).fits
    if most:
        assert serving_plan(request(size, gpu), context=context, concurrency=most).fits


# --- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"mfu": 1.5}, "--mfu 1.5: it is a share"),
        ({"nodes": -1}, "--nodes -1"),
        ({"arguments": "--deepspeed zero9"}, "--deepspeed zero9: no such file"),
        ({"arguments": "--precision float32"}, "--precision float32"),
        ({"arguments": "--embedding-rows new --deepspeed zero3"}, "--embedding-rows new"),
    ],
)
def test_wrong_wishes_are_refused(more, said):
    with pytest.raises(InputError, match=said):
        plan("lora", request("7b", **more))


def test_serving_refuses_gpus_that_do_not_divide_the_heads():
    with pytest.raises(InputError, match="32 attention heads cannot be divided"):
        serving_plan(request("7b"), gpus=3)


@pytest.mark.parametrize("more", [{"context": -1}, {"concurrency": -1}])
def test_serving_refuses_negative_numbers(more):
    with pytest.raises(InputError, match="-1: a number above 0 is needed"):
        serving_plan(request("7b"), **more)


def test_a_list_of_gpus_of_ones_own_is_read_and_a_wrong_one_refused(tmp_path):
    known = yaml.safe_load(FILE.read_text())
    path = tmp_path / "gpus.yaml"
    path.write_text(yaml.safe_dump({"mine": {**known["h100-80gb"], "memory_mib": 98_304}}))
    assert gpu_of("mine", path).memory == 96 * 2**30
    a10 = known["a10-24gb"]
    # of a device that no training knows, its speed has to be given
    mine = [{**a10, "mfu": 0}, {**a10, "device": "Mine"}]
    for wrong in ("[", "mine: 3", "mine: {memory_mib: 1}", *(yaml.safe_dump({"mine": one}) for one in mine)):
        path.write_text(wrong)
        with pytest.raises(InputError, match=r"gpus\.yaml"):
            gpus(path)


def test_an_unknown_gpu_names_the_nearest():
    with pytest.raises(InputError, match=r"--gpu h100-80: not known \(did you mean h100-80gb\?\)"):
        gpu_of("h100-80")
