"""Batch answers: what is asked reaches the model as in training, and the answers are published."""

import errno
import gzip
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from components.generate import journal
from components.generate.generate import SAMPLES, answer_into_file, generate, questions, read_questions
from components.generate.journal import file_journal
from components.generate.options import Generate
from components.generate.replay import fault
from components.prepare_dataset.options import PrepareDataset
from components.prepare_dataset.preparer import prepare_dataset
from zhllama.artifacts.open import open_artifact
from zhllama.data.corpus import read_documents
from zhllama.errors import InputError
from zhllama.stage.command_line import parse
from zhllama.stage.inputs import Inputs
from zhllama.stage.run import run_stage
from zhllama.tokenizer.chat import Chat
from zhllama.tokenizer.prompt import RECIPE
from zhllama.tokenizer.vocabulary import load_encoder

SHORT = {"do_sample": False, "max_new_tokens": 8}


def said(reference: str) -> list[dict[str, str]]:
    return list(json.loads(open_artifact(reference).read(SAMPLES)))


def test_the_defaults_are_the_recipes() -> None:
    config = Generate(model="m", prompt="x")
    assert (config.temperature, config.top_k, config.top_p, config.do_sample) == (0.2, 40, 0.9, True)
    assert (config.repetition_penalty, config.max_new_tokens) == (1.1, 400)


def test_a_prompt_is_wrapped_and_its_answer_published(tiny_model: str, store: str) -> None:
    manifest = run_stage(Generate(store=store, model=tiny_model, prompt="写一首诗。", **SHORT), generate)
    assert manifest.kind == "samples"
    (sample,) = said(manifest.reference)
    assert sample["Input"] == RECIPE.wrap("写一首诗。")
    assert manifest.facts["summary"] == "1 answers"


def test_without_wrapping_the_model_reads_the_text_alone(tiny_model: str, tmp_path: Path) -> None:
    config = Generate(store=str(tmp_path), model=tiny_model, prompt="从前有座山", with_prompt=False, **SHORT)
    assert said(run_stage(config, generate).reference)[0]["Input"] == "从前有座山"


items = [{"instruction": "翻译。", "input": "Open file"}, {"instruction": "写诗。", "input": "", "output": ""}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps(items)),
        ("a.jsonl", "".join(json.dumps(item) + "\n" for item in items)),
        ("a.txt", "翻译。\n\n写诗。\n"),
    ],
)
@pytest.mark.parametrize("wrapped", [True, False])
def test_questions_come_from_lines_or_items(
    tmp_path: Path, tiny_model: str, name: str, content: str, wrapped: bool
) -> None:
    (tmp_path / name).write_text(content)
    first = "翻译。" if name == "a.txt" else "翻译。\nOpen file"
    expected = [first, "写诗。"]
    config = Generate(model=tiny_model, input=str(tmp_path / name), with_prompt=wrapped)
    found = questions(config, Inputs(config))
    expected = [RECIPE.wrap(text) for text in expected] if wrapped else expected
    encoder = load_encoder(open_artifact(tiny_model), "--model")
    assert found == [(text, [encoder.bos, *encoder.encode(text)]) for text in expected]


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_model_with_a_template_of_its_own_is_asked_by_that(chatml_model: Path, wrapped: bool) -> None:
    config = Generate(model=str(chatml_model), prompt="你好", with_prompt=wrapped)
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    )
    (chatml_model / "chat_template.jinja").write_text(template + "{{ '<|im_start|>assistant\n' }}")
    ((text, ids),) = questions(config, Inputs(config))
    encoder = load_encoder(open_artifact(str(chatml_model)), "--model")
    if wrapped:
        assert text == "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
        parts = (encoder.encode(one) for one in ("user\n你好", "\n", "assistant\n"))
        assert ids == [800, *next(parts), 801, *next(parts), 800, *next(parts)]
    else:
        assert (text, ids) == ("你好", [encoder.bos, *encoder.encode("你好")])


def test_a_special_token_in_a_question_is_text_as_in_training(tiny_model: str) -> None:
    config = Generate(model=tiny_model, prompt="a</s>b")
    ((text, ids),) = questions(config, Inputs(config))
    encoder = load_encoder(open_artifact(tiny_model), "--model")
    assert (text, ids) == (RECIPE.wrap("a</s>b"), [encoder.bos, *encoder.encode(RECIPE.wrap("a</s>b"))])
    assert encoder.eos not in ids


SAID = [
    {"role": "system", "content": "短"},
    {"role": "user", "content": "写诗。"},
    {"role": "assistant", "content": "春风"},
    {"role": "user", "content": "再来"},
]


@pytest.mark.parametrize("answered", [True, False])
def test_a_conversation_is_asked_up_to_its_last_answer(tiny_model: str, tmp_path: Path, answered: bool) -> None:
    more = [{"role": "assistant", "content": "好"}] if answered else []
    (tmp_path / "items.json").write_text(json.dumps([{"messages": SAID + more}, *items]))
    config = Generate(model=tiny_model, input=str(tmp_path / "items.json"))
    first, *others = questions(config, Inputs(config))
    chat = Chat(load_encoder(open_artifact(tiny_model), "--model"), RECIPE.template)
    assert first.text == f"{RECIPE.wrap('短' + chr(10) + '写诗。')}春风</s>{RECIPE.wrap('再来')}"
    assert first.ids == chat.ids(SAID, trained=True)
    assert [one.text for one in others] == [RECIPE.wrap("翻译。\nOpen file"), RECIPE.wrap("写诗。")]


def test_a_conversation_that_the_template_refuses_is_named(chatml_model: Path, tmp_path: Path) -> None:
    (chatml_model / "chat_template.jinja").write_text("{{ 'x' if messages | length == 1 else raise_exception('one') }}")
    (tmp_path / "items.json").write_text(json.dumps([*items, {"messages": SAID}]))
    config = Generate(model=str(chatml_model), input=str(tmp_path / "items.json"))
    with pytest.raises(InputError, match=r"--input .*items.json: item 3: the model's chat template refuses .*: one"):
        questions(config, Inputs(config))


def test_compressed_items_are_items(tmp_path: Path) -> None:
    (tmp_path / "items.json.gz").write_bytes(gzip.compress(json.dumps(items).encode()))
    assert read_questions(open_artifact(str(tmp_path / "items.json.gz"))) == ["翻译。\nOpen file", "写诗。"]


@pytest.mark.parametrize("beside", ["report.json", "card.json"])
def test_what_lies_beside_the_lines_makes_them_no_items(tmp_path: Path, beside: str) -> None:
    (tmp_path / "a.txt").write_text("翻译。\n写诗。\n")
    (tmp_path / beside).write_text("{}")
    assert read_questions(open_artifact(str(tmp_path))) == ["翻译。", "写诗。"]


def test_a_file_is_answered_in_order(tiny_model: str, tmp_path: Path, chinese_text: list[str]) -> None:
    (tmp_path / "asked.txt").write_text("\n".join(chinese_text[:11]))
    given = {"model": tiny_model, "input": str(tmp_path / "asked.txt"), **SHORT}
    found = said(run_stage(Generate(store=str(tmp_path / "store"), **given), generate).reference)
    assert [sample["Input"] for sample in found] == [RECIPE.wrap(text) for text in chinese_text[:11]]
    alone = Generate(store=str(tmp_path / "store"), model=tiny_model, prompt=chinese_text[7], **SHORT)
    assert found[7] == said(run_stage(alone, generate).reference)[0]


@pytest.mark.slow
def test_the_command_takes_kfps_texts_and_writes_the_reference(tiny_model: str, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "components.generate", "--store", str(tmp_path / "store"), "--model", tiny_model),
        *("--adapters", "", "--prompt", "你好", "--input", "", "--with-prompt", "true", "--do-sample", "false"),
        *("--temperature", "0.2", "--max-new-tokens", "4", "--seed", "42"),
        *("--output", str(tmp_path / "manifest"), "--reference", str(tmp_path / "ref")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(said((tmp_path / "ref").read_text())) == 1
    assert json.loads((tmp_path / "manifest").read_text())["kind"] == "samples"


@pytest.mark.slow
def test_without_a_store_the_answer_is_printed(tiny_model: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "components.generate", "--model", tiny_model, "--prompt", "你好"]
    command += ["--do-sample", "false", "--max-new-tokens", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    stored = run_stage(Generate(store=str(tmp_path), model=tiny_model, prompt="你好", **SHORT), generate)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == said(stored.reference)[0]["Output"].strip()


# --- going on where a run stopped -------------------------------------------------------------------------------------


ASK = ("--do-sample", "true", "--temperature", "1.5", "--max-new-tokens", "24")


@pytest.fixture
def command(tiny_model: str, tmp_path: Path, chinese_text: list[str]) -> list[str]:
    """The command on 40 questions, drawing its answers; what it writes into is added by the test."""
    (tmp_path / "asked.txt").write_text("\n".join(chinese_text[:40]))
    base = [sys.executable, "-m", "components.generate", "--model", tiny_model]
    return [*base, "--input", str(tmp_path / "asked.txt"), *ASK]


def kill_after(command: list[str], begun: Callable[[], bool]) -> None:
    """Starts the command, and kills it (-9) as soon as `begun` holds."""
    with subprocess.Popen(command, stderr=subprocess.PIPE) as program:
        while not begun():
            assert program.poll() is None, program.stderr and program.stderr.read()
            time.sleep(0.005)
        program.kill()


@pytest.mark.slow
def test_a_killed_run_goes_on_after_its_last_answer(
    command: list[str], tmp_path: Path, chinese_text: list[str]
) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    subprocess.run([*command, "--answers", str(whole)], check=True, capture_output=True, timeout=300)
    kill_after([*command, "--answers", str(cut)], lambda: cut.exists() and cut.stat().st_size > 0)
    kept = cut.read_bytes()
    cut.write_bytes(kept + b'{"Input": "half a li')
    done = subprocess.run([*command, "--answers", str(cut)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"going on after (8|16|24|32) of 40 answers", done.stderr)
    lines = [json.loads(line) for line in cut.read_text().splitlines()]
    assert [line["Input"] for line in lines] == [RECIPE.wrap(text) for text in chinese_text[:40]]
    # the draws of each batch are its own: the same answers as without the kill
    assert cut.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["asked.txt", "cut.jsonl", "whole.jsonl"]


@pytest.mark.slowest
def test_a_killed_run_into_a_store_goes_on_too(command: list[str], tmp_path: Path) -> None:
    store = tmp_path / "store"
    stored = [*command, "--store", str(store), "--reference", str(tmp_path / "ref")]
    kill_after(stored, lambda: any(store.glob("generate/*/.answers/*.json")))
    assert not list(store.glob("generate/*/manifest.json"))
    done = subprocess.run(stored, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "going on after" in done.stderr
    fresh = [*command, "--answers", str(tmp_path / "fresh.json")]
    subprocess.run(fresh, check=True, capture_output=True, timeout=300)
    assert said((tmp_path / "ref").read_text()) == json.loads((tmp_path / "fresh.json").read_text())
    assert not list(store.glob("generate/*/.answers/*.json"))


def test_answers_that_other_settings_began_are_not_gone_on_with(tmp_path: Path) -> None:
    with suppress(KeyboardInterrupt), file_journal(tmp_path / "a.jsonl", "one", ["q"] * 9) as (_, keep):
        keep([{"Input": "q", "Output": "a"}] * 8)
        raise KeyboardInterrupt
    with (
        pytest.raises(InputError, match="begun with another model or other settings"),
        file_journal(tmp_path / "a.jsonl", "two", ["q"]),
    ):
        pass
    # other questions are simply asked
    with file_journal(tmp_path / "a.jsonl", "one", ["other"]) as (answered, _):
        assert answered == []


def test_answers_that_cannot_be_kept_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(journal, "open", full, raising=False)
    with pytest.raises(OSError, match="No space left"), file_journal(tmp_path / "a.jsonl", "one", ["q"]):
        pass


def test_a_file_that_is_somebody_elses_is_left_alone(tiny_model: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("mine")
    config = Generate(model=tiny_model, prompt="x", answers=str(tmp_path / "a.json"), **SHORT)
    with pytest.raises(InputError, match="it is there already; give another name"):
        answer_into_file(config, Inputs(config))
    assert (tmp_path / "a.json").read_text() == "mine"


def test_a_run_that_is_refused_leaves_no_file(tiny_model: str, tmp_path: Path) -> None:
    config = Generate(model=tiny_model, prompt="长" * 3000, answers=str(tmp_path / "a.jsonl"), **SHORT)
    with pytest.raises(InputError, match="or give a --context-length"):
        answer_into_file(config, Inputs(config))
    assert not list(tmp_path.iterdir())


def test_a_longer_context_is_answered_where_it_is_asked_for(tiny_model: str, tmp_path: Path) -> None:
    config = Generate(
        model=tiny_model, prompt="长" * 800, context_length=4096, answers=str(tmp_path / "a.json"), **SHORT
    )
    answer_into_file(config, Inputs(config))
    (sample,) = json.loads((tmp_path / "a.json").read_text())
    assert sample["Output"]


# --- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "give one of --prompt TEXT, --input FILE and --interactive"),
        (["--prompt", "x", "--interactive"], "give one of"),
        (["--prompt", "x", "--reference", "r"], "--reference needs a --store"),
        (["--interactive", "--store", "s"], "leave out --store or --interactive"),
        (["--prompt", "x", "--temperature", "0"], "--temperature is 0.0; it must be above 0"),
        (["--prompt", "x", "--top-p", "1.5"], "--top-p is 1.5"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--prompt", "x", "--rope-alpha", "0.5"], "--rope-alpha is 0.5; it must be 1"),
        (["--prompt", "x", "--context-length", "-1"], "--context-length is -1"),
        (["--prompt", "x", "--answers", "a.txt"], "ends in .json or .jsonl"),
        (["--interactive", "--answers", "a.json"], "leave out one"),
        (["--prompt", "x", "--store", "s", "--answers", "a.json"], "leave out one"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments: list[str], line: str) -> None:
    with pytest.raises(InputError, match=line):
        parse(Generate, ["--model", "m", *arguments])


@pytest.mark.parametrize(("content", "line"), [("", "are empty"), ("[]", "no item in it"), ("[{}]", "'instruction'")])
def test_a_file_without_questions_is_refused(tiny_model: str, tmp_path: Path, content: str, line: str) -> None:
    file = tmp_path / ("asked.json" if content else "asked.txt")
    file.write_text(content or "\n\n")
    config = Generate(store=str(tmp_path / "store"), model=tiny_model, input=str(file))
    with pytest.raises(InputError, match=line):
        run_stage(config, generate)


def test_a_prompt_longer_than_the_context_is_named(tiny_model: str, tmp_path: Path) -> None:
    (tmp_path / "asked.txt").write_text("你好\n" + "长" * 2000 + "\n")
    config: Any = Generate(store=str(tmp_path / "store"), model=tiny_model, input=str(tmp_path / "asked.txt"))
    with pytest.raises(InputError, match=r"--input .*: item 2: \d+ tokens, and the model has 2048 positions"):
        run_stage(config, generate)


# --- what a training is not to lose -----------------------------------------------------------------------------------

ENGLISH = "The ship lay at anchor in the bay while seven men rowed ashore to look for water, wood and a way inland."


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (ENGLISH, ""),
        (ENGLISH[:80], "too short"),
        ("  " + ENGLISH[:80] + "\n" * 40, "too short"),
        ("the same words " * 40, "repeats itself"),
        (ENGLISH + "".join(chr(0x4E00 + number) for number in range(60)), "Chinese"),
        (ENGLISH + "\ufffd\x00\x01\x07", "no text"),
    ],
)
def test_a_document_is_left_out_for_a_reason(text: str, why: str) -> None:
    assert fault(text) == why


def test_the_model_writes_text_that_is_packed_and_the_same_every_time(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a model that was never trained writes no text
    monkeypatch.setattr("components.generate.replay.fault", lambda text: "too short" if len(text) < 8 else "")
    (tmp_path / "seeds.txt").write_text("The ship\nSeven men\n")
    given = {"model": tiny_model, "replay_documents": 9, "max_new_tokens": 12, "input": str(tmp_path / "seeds.txt")}
    made, again = (run_stage(Generate(store=str(tmp_path / name), **given), generate) for name in ("one", "other"))
    assert made.digest == again.digest
    texts = [*read_documents(open_artifact(made.reference))]
    assert [text.split(" ")[0] for text in texts] == ["The", "Seven"] * 4 + ["The"]
    assert len(set(texts)) == made.facts["documents"] == 9
    assert not list((tmp_path / "one").glob("generate/*/.answers/*"))
    packing = PrepareDataset(
        store=str(tmp_path / "packed"),
        tokenizer=tiny_model,
        text=made.reference,
        block_size=32,
        validation_fraction=0.3,
    )
    assert run_stage(packing, prepare_dataset).kind == "packed-dataset"


def test_a_model_that_writes_nothing_of_use_ends_it(tiny_model: str, tmp_path: Path) -> None:
    config = Generate(store=str(tmp_path), model=tiny_model, replay_documents=2, max_new_tokens=4)
    with pytest.raises(InputError, match=r"of 2 documents none can be replayed \(2 too short\); give --input"):
        run_stage(config, generate)
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"store": ""}, "--replay-documents needs a --store"),
        ({"prompt": "x"}, "--prompt is for what --replay-documents is not"),
        ({"temperature": 0.7}, "--temperature: what is replayed is drawn as it comes"),
        ({"with_prompt": False}, "--with-prompt: what is replayed"),
        ({"replay_documents": -1}, "--replay-documents is -1; it must be 1 or more"),
    ],
)
def test_what_does_not_go_with_replay_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Generate(**{"model": "m", "store": "s", "replay_documents": 5, **options})
