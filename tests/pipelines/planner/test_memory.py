"""The planner's formulae against torch's own figures: peak, parameters, operations. One formula for every case."""

import json
import shlex
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from components.launch_training.command import FinetuneArguments as Finetune
from components.launch_training.command import PretrainArguments as Pretrain
from pipelines.planner import memory
from pipelines.planner.estimate import flops_per_token
from pipelines.planner.gpus import gpus
from pipelines.sizes import Architecture
from tests.pipelines.planner.measured_training import Case, peaks, run
from zhllama.stage.command_line import parse
from zhllama.training.options import SHIPPED_DEEPSPEED, deepspeed_settings

WITHIN = 0.10
"""The bar is 15%."""

SMALL: dict[str, Any] = {"width": 256, "layers": 4, "heads": 4, "feed_forward": 688, "pieces": 4000}
"""5 million parameters."""
WIDE: dict[str, Any] = {"width": 384, "layers": 6, "heads": 6, "feed_forward": 1024, "pieces": 49_954}
"""49 million, most of them in the recipe's vocabulary."""
DEEP: dict[str, Any] = {"width": 512, "layers": 12, "heads": 8, "feed_forward": 1376, "pieces": 8000}
"""46 million, most of them in the layers."""
SHARED: dict[str, Any] = {**SMALL, "heads": 8, "more": {"key_value_heads": 2}}
TIED: dict[str, Any] = {**SMALL, "more": {"tied": True}}
QWEN3: dict[str, Any] = {
    **SMALL, "more": {"type": "qwen3", "key_value_heads": 2, "head_width": 128, "tied": True},
}  # fmt: skip


def case(model: dict[str, Any], stage: str, batch: int, block: int, more: str = "--deepspeed none") -> Case:
    return Case(**model, stage=stage, block=block, arguments=f"--per-device-train-batch-size {batch} {more}")


def setting(made: Case, processes: int = 1) -> memory.Setting:
    words = ["--model", "-", "--dataset", "-", "--store", "-"]
    words += ["--stage", made.stage] if made.stage != "sft" else []
    options = parse(Finetune if made.stage == "sft" else Pretrain, words + shlex.split(made.arguments))
    return memory.Setting.of(
        options,
        deepspeed_settings(options),
        model=made.model,
        pieces=made.pieces,
        new_rows=made.pieces - made.pieces_before,
        processes=processes,
        block=made.block,
        device="cpu",
        learned=1 - made.documents / made.block,
    )


def assert_close(made: Case, found: int, processes: int = 1) -> None:
    phase = memory.peak(setting(made, processes))
    off = phase.total / found - 1
    assert abs(off) < WITHIN, f"{off:+.1%}: {phase.total:,} planned ({phase.name}: {phase.parts}), {found:,} measured"


# --- without DeepSpeed ------------------------------------------------------------------------------------------------

CHECKPOINTING = "--gradient-checkpointing true"
PLAIN = {
    "embeddings": case(SMALL, "embeddings", 8, 256),
    "embeddings, recomputed": case(SMALL, "embeddings", 4, 256, f"--deepspeed none {CHECKPOINTING}"),
    "embeddings and head, bfloat16": case(
        SMALL, "embeddings", 4, 128, "--deepspeed none --precision bfloat16 --also-lm-head true"
    ),
    "embeddings, averaged": case(SMALL, "embeddings", 8, 256, "--deepspeed none --ema 0.9"),
    "lora": case(SMALL, "lora", 2, 128),
    "lora, recomputed": case(SMALL, "lora", 4, 256, f"--deepspeed none {CHECKPOINTING}"),
    "lora, bfloat16, two passes": case(
        SMALL, "lora", 4, 128, "--deepspeed none --precision bfloat16 --gradient-accumulation-steps 2"
    ),
    "lora, new rows": case(SMALL, "lora", 2, 128, "--deepspeed none --embedding-rows new"),
    "sft, recomputed": case(SMALL, "sft", 4, 256, f"--deepspeed none {CHECKPOINTING}"),
    "sft with embeddings, no dropout": case(
        SMALL, "sft", 4, 128, "--deepspeed none --train-embeddings true --lora-dropout 0 --lora-r 64"
    ),
    "49 million, wide: embeddings": case(WIDE, "embeddings", 1, 256),
    "49 million, wide: lora": case(WIDE, "lora", 1, 256),
    "49 million, wide: sft, recomputed": case(WIDE, "sft", 1, 256, f"--deepspeed none {CHECKPOINTING}"),
    "46 million, deep: embeddings, recomputed": case(DEEP, "embeddings", 2, 128, f"--deepspeed none {CHECKPOINTING}"),
    "46 million, deep: lora, recomputed": case(DEEP, "lora", 2, 128, f"--deepspeed none {CHECKPOINTING}"),
    "shared keys and values: sft": case(SHARED, "sft", 2, 256),
    "tied: embeddings": case(TIED, "embeddings", 4, 256),
    "tied: lora": case(TIED, "lora", 2, 128),
    "tied: new rows": case(TIED, "lora", 2, 128, "--deepspeed none --embedding-rows new"),
    "qwen3: sft": case(QWEN3, "sft", 2, 256),
    "qwen3: lora, bfloat16": case(QWEN3, "lora", 4, 128, "--deepspeed none --precision bfloat16"),
    "46 million, deep: sft": case(DEEP, "sft", 1, 256),
}


@pytest.fixture(scope="session")
def plain_peaks() -> dict[str, int]:
    cases = list(PLAIN.values())
    return dict(zip(PLAIN, peaks(run(cases), cases), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", PLAIN)
def test_the_peak_of_a_training_is_as_planned(plain_peaks, name):
    assert_close(PLAIN[name], plain_peaks[name])


# --- DeepSpeed --------------------------------------------------------------------------------------------------------


DEEPSPEED = (
    "embeddings, zero2, recomputed", "lora, zero2, two passes", "sft, zero2, recomputed", "lora, zero3", "lora, zero2",
)  # fmt: skip


@pytest.fixture(scope="session")
def deepspeed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Trainings in bfloat16 under ZeRO. The shipped files' buckets of 10⁸ elements would be most of the memory of so
    small a model, and hide the rest: here they are as small beside its embeddings as those beside a 7B model's."""
    folder = tmp_path_factory.mktemp("deepspeed")
    files = {}
    for name in ("zero2", "zero3"):
        shipped = Path(deepspeed_settings.__code__.co_filename).with_name(f"{name}.json")
        settings = json.loads(shipped.read_text())
        zero = settings["zero_optimization"] | {"reduce_bucket_size": 10**5}
        if name == "zero3":
            zero |= {
                "stage3_prefetch_bucket_size": 10**5,
                "stage3_param_persistence_threshold": 10**4,
                "stage3_max_live_parameters": 10**6,
                "stage3_max_reuse_distance": 10**6,
            }
        files[name] = folder / f"{name}.json"
        files[name].write_text(json.dumps({**settings, "zero_optimization": zero}))
    two, three = (f"--precision bfloat16 --deepspeed {files[name]}" for name in ("zero2", "zero3"))
    made = (
        case(SMALL, "embeddings", 2, 128, f"{two} {CHECKPOINTING}"),
        case(SMALL, "lora", 2, 128, f"{two} --gradient-accumulation-steps 2"),
        case(SMALL, "sft", 4, 256, f"{two} {CHECKPOINTING}"),
        case(SMALL, "lora", 2, 256, three),
        case(SMALL, "lora", 2, 256, two),
    )
    return dict(zip(DEEPSPEED, made, strict=True))


@pytest.fixture(scope="session")
def of_two_processes(deepspeed: dict[str, Case]) -> dict[str, list[int]]:
    """Name → the peak of each of two processes that train together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    cases = list(deepspeed.values())
    started = [run(cases, RANK=str(rank), LOCAL_RANK=str(rank), **together) for rank in range(2)]
    found = zip(*(peaks(process, cases) for process in started), strict=True)
    return dict(zip(deepspeed, map(list, found), strict=True))


@pytest.mark.slowest
@pytest.mark.parametrize("name", DEEPSPEED)
def test_the_peak_of_each_of_two_processes_under_deepspeed_is_as_planned(deepspeed, of_two_processes, name):
    for found in of_two_processes[name]:
        assert_close(deepspeed[name], found, processes=2)


# --- what is counted --------------------------------------------------------------------------------------------------

SEVEN = Architecture(width=4096, layers=32, heads=32, feed_forward=11008)


def seven(stage: str, pieces: int, more: str = "") -> memory.Setting:
    words = ["--model", "-", "--dataset", "-", "--store", "-", *(["--stage", stage] if stage != "sft" else [])]
    options = parse(Finetune if stage == "sft" else Pretrain, words + more.split())
    return memory.Setting.of(
        options, None, model=SEVEN, pieces=pieces, new_rows=pieces - 32_000, processes=1, block=512
    )


@pytest.mark.parametrize(
    ("stage", "pieces", "more", "count"),
    [
        ("embeddings", 49_953, "", 204_607_488),
        ("lora", 49_953, "", 429_203_456),
        ("lora", 49_953, "--embedding-rows new", 167_059_456),
        ("sft", 49_954, "", 19_988_480),
        ("sft", 49_954, "--train-embeddings true", 429_211_648),
        ("sft", 49_954, "--train-embeddings true --lora-r 64", 569_131_008),
    ],
)
def test_trained_parameters_are_the_recipes(stage, pieces, more, count):
    assert seven(stage, pieces, more).trained == count


def test_the_base_has_as_many_parameters_as_the_recipe_says():
    assert seven("embeddings", 49_953).base_parameters == 6_885_486_592


@pytest.mark.parametrize("stage", ["embeddings", "lora", "sft"])
def test_operations_are_those_that_the_training_logs(stage):
    import torch
    from transformers import LlamaConfig

    from zhllama.training.inputs import LoraShape
    from zhllama.training.metrics import flops_per_token as logged
    from zhllama.training.model import add_lora, packed, train_embeddings_only

    two_layers = Architecture(width=4096, layers=2, heads=32, feed_forward=11008)
    with torch.device("meta"):
        model: Any = packed("LlamaForCausalLM")(
            LlamaConfig(vocab_size=49_954, hidden_size=4096, intermediate_size=11008, num_hidden_layers=2)
        ).requires_grad_(False)
        if stage == "embeddings":
            model = train_embeddings_only(model, also_lm_head=False)
        else:
            model = add_lora(
                model, LoraShape(8, 32, 0.05, list(two_layers.kind.lora_modules), "all" if stage == "lora" else "")
            )
    made = seven(stage, 49_954)
    found, _ = flops_per_token(memory.Setting(**{**vars(made), "model": two_layers}))
    assert found == pytest.approx(logged(model, 1.0), rel=1e-3)


def test_the_gpus_do_what_the_training_takes_them_to_do():
    from zhllama.training.hardware import peak_tflops

    for gpu in gpus().values():
        assert 0 < peak_tflops(gpu.device) == gpu.tflops, gpu.name


@pytest.mark.parametrize("name", SHIPPED_DEEPSPEED)
def test_every_shipped_deepspeed_file_is_understood(name):
    settings = deepspeed_settings(parse(Finetune, f"--model - --dataset - --store - --deepspeed {name}".split()))
    zero = memory.Zero.of(settings, "cuda")
    assert zero.stage == (3 if name == "zero3" else 2)
    assert zero.offloads_optimizer == (name == "zero2_offload")
    assert (zero.reduce_bucket, zero.overlaps) == (10**8, True)


# --- how it changes ---------------------------------------------------------------------------------------------------


def totals(settings: Iterable[memory.Setting]) -> list[int]:
    return [memory.peak(one).total for one in settings]


def test_what_is_said_to_save_memory_does():
    def lora(more: str, processes: int = 16) -> memory.Setting:
        words = f"--stage lora --model - --dataset - --store - {more}".split()
        options = parse(Pretrain, words)
        return memory.Setting.of(
            options, deepspeed_settings(options), model=SEVEN, pieces=49_954, new_rows=17_954, processes=processes,
            block=512,
        )  # fmt: skip

    zero3 = "--deepspeed zero3 --gradient-checkpointing true --per-device-train-batch-size 1"
    ladder = totals(
        [
            lora("--deepspeed none"),
            lora("--deepspeed zero2"),
            lora("--deepspeed zero2 --gradient-checkpointing true"),
            lora("--deepspeed zero2 --gradient-checkpointing true --per-device-train-batch-size 1"),
            lora(zero3),
            lora(zero3, processes=64),
        ]
    )
    assert ladder == sorted(ladder, reverse=True)
