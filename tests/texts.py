"""Texts, and a tokenizer, that are made, not fetched: the same ones on every machine and in every session."""

import io
import random
import sysconfig
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

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


def chinese_sentences(seed: int = 20) -> Iterator[str]:
    """Different Chinese sentences, as many as are asked for: templates filled from word lists."""
    chance = random.Random(seed)
    words = {name: listed.split() for name, listed in _WORDS.items()}
    found: set[str] = set()
    while True:
        chosen = {name: chance.choice(options) for name, options in words.items()}
        chosen["other"] = chance.choice([word for word in words["who"] if word != chosen["who"]])
        chosen["away"] = chance.choice([word for word in words["place"] if word != chosen["place"]])
        sentence = chance.choice(_SENTENCES).format(number=chance.randint(2, 99), **chosen)
        if sentence not in found:
            found.add(sentence)
            yield sentence


def code_lines() -> Iterator[str]:
    """Lines of Python, with their indentation: the standard library's own."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield from path.read_text("utf-8").split("\n")


_ODD = (
    "🤗 😂👍🏽 👩‍👩‍👧‍👦 🇨🇳 ❤️‍🔥",
    "　全角空格　ＡＢＣ１２３（全角）！？：；“引号”《书名》【方括号】",
    "𠀀𠮷𡃁𪚥𫝀 扩展区的字，𣎴常见；㐀㑇 〇 々 〆",
    "tab\there\t\tand\t\t\tthere",
    "double  triple   many          spaces    ",
    "   leading and trailing   ",
    "▁ the mark itself ▁▁ and a▁b",
    "<0x0A> <0xE4> are text",
    "é e\u0301 ﬁ Å ½ ① Ⅳ ㎏ ｶﾀｶﾅ カタカナ ひらがな 한국어 Ελληνικά русский עברית العربية हिन्दी ไทย",
    "\u00a0no-break\u2009thin\u200bzero\u200dwidth\ufeffmark\u3000wide",
    "null\x00 bell\x07 escape\x1b delete\x7f",
    "{'键': [1, 2.5e-3, None], \"k\": '值'}  # 注释",
    "https://example.com/路径?q=中文&n=1#片段",
    "",
    " ",
    "\t",
)


def mixed_lines(count: int, seed: int = 7) -> list[str]:
    """Lines of every kind: Chinese, English and code, emoji, odd spaces, rare characters, empty and very long ones."""
    chance = random.Random(seed)
    chinese = list(islice(chinese_sentences(seed), count // 4))
    code = list(islice(code_lines(), count // 2))
    lines = chinese + code + list(_ODD)
    joints = ("", " ", "  ", "\t", "，", "　", "\n", "🤗", "。", "    ")
    while len(lines) < count - 20:
        parts = chance.choices((chinese, code, _ODD), weights=(5, 3, 2), k=chance.randint(2, 4))
        text = ""
        for part in parts:
            one = chance.choice(part)
            begin = chance.randrange(len(one) + 1)
            text += one[begin : begin + 60] + chance.choice(joints)
        lines.append(text)
    lines += ["".join(chance.choices(chinese, k=150)) for _ in range(10)]
    lines += ["的" * 3000, "a" * 3000, " " * 3000, "ab" * 3000, "哈哈" * 2000, "－" * 500, "\t" * 500]
    while len(lines) < count:
        lines.append("".join(chance.choices("的一是在不了有和人这中大为上个国 abc，。\t", k=3000)))
    return lines


def llama_shaped(lines: Iterable[str], pieces: int) -> bytes:
    """A tokenizer.model of LLaMA's shape: BPE, byte fallback, ids 0/1/2, identity normaliser.

    Its trainer's settings, scores and the white-space pieces (at −1e9, in that order) are as in LLaMA's own.
    """
    import sentencepiece

    from zhllama.tokenizer.sentencepiece_model import parse_model

    spaces = (2, 4, 8, 5, 16, 6, 12, 13, 10, 14, 3, 9, 7, 11)
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=made,
        model_type="bpe",
        vocab_size=pieces - len(spaces),
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
    for length in spaces:
        proto.pieces.add(piece="▁" * length)
    for piece in proto.pieces:
        if not piece.piece.strip("▁"):
            piece.score = -1e9
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return bytes(proto.SerializeToString())


def unigram_model(sentences: Iterable[str], pieces: int) -> bytes:
    """A unigram tokenizer.model of the sentences: byte fallback, identity normaliser."""
    import sentencepiece

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=made,
        model_type="unigram",
        vocab_size=pieces,
        byte_fallback=True,
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
    )
    return made.getvalue()
