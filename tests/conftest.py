"""Fixtures that many tests use: a real S3 server for the session, and a store (folder or S3) per test."""

import ast
import io
import itertools
import os
import random
import signal
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from components.shared import storage
from pipelines.local_s3 import LocalS3

# tests run side by side on few cores: one thread per process is faster than many that fight
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
# a shell that starts the suite in the background has it ignore Ctrl-C, and every program under test inherits that
signal.signal(signal.SIGINT, signal.default_int_handler)

# on a busy machine an example may take long: that says nothing about the code
hypothesis.settings.register_profile("busy machine", deadline=None)
hypothesis.settings.load_profile("busy machine")

_numbers = itertools.count()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalS3]:
    """SeaweedFS on loopback, one for the session (one per xdist worker)."""
    with LocalS3(tmp_path_factory.mktemp("s3"), bucket="tests") as server:
        yield server


@pytest.fixture
def s3_store(s3_server: LocalS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """An empty s3:// prefix of its own, with the environment that reaches it."""
    for name, value in s3_server.access.environment().items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ZHLLAMA_CACHE", str(tmp_path / "cache"))
    storage.forget_client()
    return f"s3://tests/{os.getpid()}-{next(_numbers)}"


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store of each kind: the test runs once with a folder and once with S3."""
    if request.param == "folder":
        return str(tmp_path / "store")
    return str(request.getfixturevalue("s3_store"))


# --- texts and a tokenizer --------------------------------------------------------------------------------------------

_MODULES = (
    "argparse bisect configparser contextlib csv datetime decimal difflib enum fractions functools getopt gettext "
    "heapq inspect mailbox optparse pathlib pickle pprint queue random sched shelve shutil smtplib socket statistics "
    "string subprocess tarfile tempfile textwrap threading tokenize traceback uuid weakref zipfile"
)


@pytest.fixture(scope="session")
def english_text() -> list[str]:
    """Some thousand English lines: the docstrings of the standard library."""
    found: dict[str, None] = {}
    for name in _MODULES.split():
        source = Path(sysconfig.get_path("stdlib"), f"{name}.py")
        for node in ast.walk(ast.parse(source.read_text("utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                lines = (ast.get_docstring(node) or "").splitlines()
                found.update((line.strip(), None) for line in lines if len(line) > 40 and line.isascii())
    return list(found)


_WORDS = {
    "who": "我 我们 妈妈 爸爸 老师 同学 朋友 邻居 孩子们 姐姐 弟弟 医生 司机 服务员 老板 顾客 读者 作者 导演 演员",
    "when": "今天早上 昨天晚上 上个星期 去年冬天 周末 每天下午 前几天 春节期间 放假以后 毕业那年 刚才 半夜里",
    "place": "北京 上海 火车站 图书馆 酒店 饭馆 办公室 学校 医院 超市 公园 书店 电影院 家里 海边 山上 网上 河边",
    "thing": "这本书 一台电脑 新手机 热水器 蛋糕 牛肉面 豆腐 绿茶 咖啡 房间 电影 音乐 照片 电池 屏幕 键盘 快递 衣服 "
    "鞋子 自行车 蔬菜 水果 早餐 地图 词典 故事 小说 报纸 作业 礼物",
    "does": "买了 看到 收到 喜欢 讨厌 找到 修好 送来 打开 推荐 借走 忘记 谈起 需要 检查 研究 翻译 介绍 弄丢 换掉",
    "good": "非常满意 质量很好 物美价廉 服务热情 干净舒适 值得推荐 内容丰富 声音清楚 速度很快 印象深刻 味道鲜美",
    "bad": "十分失望 质量太差 价格偏高 态度冷淡 又脏又吵 不值这个钱 内容空洞 经常死机 速度太慢 毫无新意 难以下咽",
}
_SENTENCES = (
    "{when}，{who}在{place}{does}{thing}，{good}。",
    "{who}说{thing}{bad}，以后再也不去{place}了！",
    "{thing}怎么样？{who}觉得{good}，可是{other}觉得{bad}。",
    "从{place}到{away}要走{number}分钟，{who}一路上都在谈{thing}。",
    "{when}{who}花了{number}元{does}{thing}，虽然{bad}，但是{good}。",
    "如果{other}{does}{thing}，{who}就会从{place}赶回来帮忙。",
    "关于{thing}，{who}和{other}的看法不同：一个说“{good}”，一个说“{bad}”。",
    "{place}的{thing}{good}，{who}已经是第{number}次来了。",
    "请问{place}附近哪里可以{does}{thing}？{who}等了很久（大约{number}分钟）。",
    "{who}把{thing}带到{away}，{other}{when}才发现它{bad}……",
)


@pytest.fixture(scope="session")
def chinese_text() -> list[str]:
    """Six hundred different Chinese sentences, made of templates and word lists; the same in every session."""
    chance = random.Random(20)
    words = {name: listed.split() for name, listed in _WORDS.items()}
    found: dict[str, None] = {}
    while len(found) < 600:
        chosen = {name: chance.choice(options) for name, options in words.items()}
        chosen["other"] = chance.choice([word for word in words["who"] if word != chosen["who"]])
        chosen["away"] = chance.choice([word for word in words["place"] if word != chosen["place"]])
        found[chance.choice(_SENTENCES).format(number=chance.randint(2, 99), **chosen)] = None
    return list(found)


@pytest.fixture(scope="session")
def llama_tokenizer(english_text: list[str]) -> bytes:
    """A small tokenizer.model of LLaMA's shape: BPE, 800 pieces, byte fallback, ids 0/1/2, identity normaliser.

    Its trainer's settings, scores and the white-space pieces (at −1e9, in that order) are as in LLaMA's own.
    """
    import sentencepiece

    from components.shared.sentencepiece_model import parse_model

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(line.split()) for line in english_text[:3000]),
        model_writer=made,
        model_type="bpe",
        vocab_size=786,
        character_coverage=0.99995,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
    )
    proto = parse_model(made.getvalue())
    for length in (2, 4, 8, 5, 16, 6, 12, 13, 10, 14, 3, 9, 7, 11):
        proto.pieces.add(piece="▁" * length)
    for piece in proto.pieces:
        if not piece.piece.strip("▁"):
            piece.score = -1e9
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return bytes(proto.SerializeToString())


@pytest.fixture(scope="session")
def chinese_tokenizer(chinese_text: list[str]) -> bytes:
    """A small Chinese tokenizer.model, as train_tokenizer makes it: 800 pieces."""
    from components.train_tokenizer.sentencepiece_trainer import trained

    return trained(chinese_text, 800, 0.9995, "chinese_text")


# --- a tiny model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_state(llama_tokenizer: bytes) -> dict[str, Any]:
    """A seeded random LLaMA as a Hugging Face state dict, float16: 64 wide, 2 layers, 4 heads, 800 pieces."""
    import torch

    from components.shared.vocabulary import Encoder

    chance = torch.Generator().manual_seed(64)
    rows = Encoder(llama_tokenizer).size
    shapes = {"model.embed_tokens.weight": (rows, 64), "lm_head.weight": (rows, 64), "model.norm.weight": (64,)}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (64, 64) for name in "qkvo"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (192, 64) for name in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj.weight"] = (64, 192)
        shapes |= {f"{prefix}.{name}_layernorm.weight": (64,) for name in ("input", "post_attention")}
    # norms about 1, the rest with LLaMA's spread at this width, so that logits are of ordinary size
    return {
        name: (torch.randn(shape, generator=chance) * 0.1 + (len(shape) == 1)).half() for name, shape in shapes.items()
    }


@pytest.fixture(scope="session")
def tiny_meta(tmp_path_factory: pytest.TempPathFactory, tiny_state: dict[str, Any], llama_tokenizer: bytes) -> Path:
    """`tiny_state` as a folder in Meta's layout: two shards, params.json, tokenizer.model, sha256sums.txt."""
    from components.shared.meta_format import MetaParams, meta_files

    folder = tmp_path_factory.mktemp("tiny-meta")
    params = MetaParams(dim=64, n_layers=2, n_heads=4, norm_eps=1e-6, multiple_of=32)
    for name, content in meta_files(tiny_state, params, llama_tokenizer, shards=2).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_meta: Path) -> str:
    """The reference of the Hugging Face model that convert_weights makes of `tiny_meta`; its folder is the parent."""
    from components.convert_weights.converter import ConvertWeights, convert_weights
    from components.shared.cli import run_stage

    store = str(tmp_path_factory.mktemp("tiny-model"))
    return run_stage(ConvertWeights(store=store, weights=str(tiny_meta)), convert_weights).reference


@pytest.fixture(scope="session")
def extended_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: str, chinese_tokenizer: bytes) -> str:
    """The reference of `tiny_model` extended by the pieces of `chinese_tokenizer` and [PAD]."""
    from components.extend_tokenizer.extender import ExtendTokenizer, extend_tokenizer
    from components.shared.cli import run_stage

    folder = tmp_path_factory.mktemp("extended-model")
    (folder / "tokenizer.model").write_bytes(chinese_tokenizer)
    options = ExtendTokenizer(
        store=str(folder / "store"), model=tiny_model, chinese_tokenizer=str(folder / "tokenizer.model")
    )
    return run_stage(options, extend_tokenizer).reference
