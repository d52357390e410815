"""The stage command: options as KFP, pods and people write them, exit codes, skipping, and what is left for KFP."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zhllama import storage
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.stage import program
from zhllama.stage.command_line import parse
from zhllama.stage.inputs import Inputs
from zhllama.stage.options import NotKeyed, Ref, Refs, StageOptions, WeightedRefs, split_references, weighted_references
from zhllama.stage.run import cache_key, run_stage
from zhllama.storage.s3_session import current_session

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True, kw_only=True)
class Options(StageOptions):
    """An example."""

    text: str = "default"
    """A text."""
    vocab_size: int = 20_000
    """A number."""
    rate: float = 0.5
    """A rate."""
    pad: bool = True
    """A switch."""
    tied: bool | None = None
    """A switch with three positions."""
    mode: Literal["han", "all"] = "han"
    """A choice."""
    model: Ref = ""
    """One reference."""
    adapters: Refs = ""
    """Several references."""

    def __post_init__(self) -> None:
        if self.vocab_size < 1:
            raise InputError(f"--vocab-size {self.vocab_size}: at least 1 is needed; give a larger number")


def options(*words: str) -> Options:
    return parse(Options, ["--store", "/store", *words])


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ((), {}),
        (("--pad", "false"), {"pad": False}),
        (("--pad", "true"), {"pad": True}),
        (("--pad", "False"), {"pad": False}),
        (("--pad=false",), {"pad": False}),
        (("--pad",), {"pad": True}),
        (("--pad", "--text", "x"), {"pad": True, "text": "x"}),
        (("--tied", "true"), {"tied": True}),
        (("--tied", "false"), {"tied": False}),
        (("--tied",), {"tied": True}),
        (("--tied", ""), {"tied": None}),
        (("--text", ""), {"text": "default"}),
        (("--text=",), {"text": "default"}),
        (("--vocab-size", ""), {"vocab_size": 20_000}),
        (("--pad", ""), {"pad": True}),
        (("--text", "a=b"), {"text": "a=b"}),
        (("--text=a=b",), {"text": "a=b"}),
        (("--text", "true"), {"text": "true"}),
        (("--text", "two words"), {"text": "two words"}),
        (("--text", "-5"), {"text": "-5"}),
        (("--text", "--hello"), {"text": "--hello"}),
        (("--text", "-- a dash"), {"text": "-- a dash"}),
        (("--text=--pad",), {"text": "--pad"}),
        (("--text", "第一行\n第二行"), {"text": "第一行\n第二行"}),
        (("--vocab_size", "7"), {"vocab_size": 7}),
        (("--vocab-size=7",), {"vocab_size": 7}),
        (("--rate", "1e-4"), {"rate": 1e-4}),
        (("--mode", "all"), {"mode": "all"}),
        (("--adapters", "a,b"), {"adapters": "a,b"}),
        (("--adapters", "a", "--adapters", "b"), {"adapters": "a,b"}),
        (("--adapters=a:0.9", "--pad", "--adapters", "", "--adapters", "b,c"), {"adapters": "a:0.9,b,c"}),
    ],
    ids=repr,
)
def test_options_as_kfp_and_people_write_them(words, wanted):
    parsed = options(*words)
    assert parsed == Options(store="/store", **wanted)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--vocb-size", "7"), "there is no option --vocb-size (did you mean --vocab-size?)"),
        (("--xyzzy", "7"), "there is no option --xyzzy; see --help"),
        (("--vocab-size", "many"), "--vocab-size"),
        (("--pad", "perhaps"), "--pad"),
        (("--mode", "none"), "'none'"),
        (("--text",), "the option --text needs a value"),
        (("--text", "--pad"), "the option --text needs a value"),
        (("--vocab-size", "0"), "--vocab-size 0: at least 1 is needed"),
        (("stray",), "stray"),
        (("--text", "a", "stray"), "stray"),
        (("--mode", "x" * 300), "x" * 300),
        (("--model", "a", "--model", "b"), "the option --model is there twice, and takes one reference"),
    ],
    ids=repr,
)
def test_wrong_options_are_refused_in_one_line(words, line):
    with pytest.raises(InputError) as caught:
        options(*words)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_missing_required_option_is_named():
    with pytest.raises(InputError, match="--store"):
        parse(Options, [])


@given(st.text())
def test_any_text_survives_as_it_is(text):
    if text:
        assert options(f"--text={text}").text == text


# --- the input key ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Keyed(StageOptions):
    """An example with references."""

    model: Ref = ""
    sources: WeightedRefs = ""
    adapters: Refs = ""
    workers: NotKeyed[int] = 1
    size: int = 1


def key(config: Keyed) -> str:
    return cache_key(config, Inputs(config).records)


@pytest.fixture
def two_folders(tmp_path: Path) -> tuple[str, str]:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name)
    return str(tmp_path / "one"), str(tmp_path / "two")


def test_the_key_is_of_what_decides_the_result_and_of_nothing_else(two_folders):
    one, two = two_folders
    base = key(Keyed(store="/a", model=one))
    assert key(Keyed(store="/b", model=one, output="/x", reference="/y", report="/z", workers=8)) == base
    assert key(Keyed(store="/a", model=two)) != base
    assert key(Keyed(store="/a", model=one, size=2)) != base
    assert key(Keyed(store="/a", sources=one)) != base


def test_the_key_is_another_when_the_cache_version_is_raised():
    @dataclass(frozen=True, kw_only=True)
    class Raised(Keyed):
        cache_version: ClassVar[int] = 2

    assert key(Raised(store="/a")) != key(Keyed(store="/a"))


def test_the_key_follows_an_inputs_content_and_not_its_address(two_folders, tmp_path):
    one, _ = two_folders
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "a.txt").write_text("one")
    assert key(Keyed(store="/a", model=one)) == key(Keyed(store="/a", model=str(tmp_path / "copy")))
    base = key(Keyed(store="/a", model=one))
    Path(one, "a.txt").write_text("changed", encoding="utf-8")
    assert key(Keyed(store="/a", model=one)) != base


def test_order_and_weights_of_several_inputs_count(two_folders):
    one, two = two_folders
    given = (f"{one},{two}", f"{two},{one}", f"{one}:0.9,{two}:0.1", f"{one}:1,{two}:1")
    assert len({key(Keyed(store="/a", sources=value)) for value in given}) == 4
    assert key(Keyed(store="/a", sources=f"{one}:2,{two}")) == key(Keyed(store="/a", sources=f"{one}:2,{two}:1"))


def test_a_weight_where_none_counts_is_refused(two_folders):
    one, two = two_folders
    with pytest.raises(InputError, match=f"--adapters {one},{two}:0.5: weights do not count here; leave them out"):
        key(Keyed(store="/a", adapters=f"{one},{two}:0.5"))


@given(st.lists(st.tuples(st.sampled_from(["s3://b/a", "/x/y", "zh"]), st.floats(0.01, 100)), max_size=4))
def test_weights_are_read_back(pairs):
    value = ",".join(f"{address}:{weight:.4f}" for address, weight in pairs)
    assert split_references(value) == [address for address, _ in pairs]
    assert [weight for _, weight in weighted_references(value)] == [round(weight, 4) for _, weight in pairs]


@pytest.mark.parametrize("value", ["s3://bucket/prefix", "http://host:9000/a", "/path", "a:b"])
def test_a_reference_without_a_weight_has_none_and_one_beside_others_that_have(value):
    assert weighted_references(f" {value} ,") == [(value, None)]
    assert weighted_references(f"{value},zh:2") == [(value, 1.0), ("zh", 2.0)]


def test_a_package_that_is_not_installed_is_named():
    class WithoutPackage(StageOptions):
        libraries = ("no-such-package",)

    with pytest.raises(InputError, match="no-such-package is not installed"):
        cache_key(WithoutPackage(store="/a"), {})


# --- a stage as a function --------------------------------------------------------------------------------------------


def test_work_that_is_done_is_not_done_again(store):
    done = []

    def work(config: Options, inputs: Inputs, out: ArtifactWriter) -> Manifest:
        done.append(config.text)
        out.add_bytes("text", config.text.encode())
        out.facts["summary"] = "one text"
        return out.publish("files")

    first = run_stage(Options(store=store, text="a"), work)
    assert run_stage(Options(store=store, text="a"), work) == first
    assert run_stage(Options(store=store, text="b"), work) != first
    assert done == ["a", "b"]
    storage.delete(f"{first.root}/text")
    run_stage(Options(store=store, text="a"), work)
    assert done == ["a", "b", "a"]


def append(folder: Path) -> None:
    with open(folder / "a.txt", "a", encoding="utf-8") as file:
        file.write(" and more")


def replace_by_another_of_the_same_size_and_time(folder: Path) -> None:
    before = (folder / "a.txt").stat()
    (folder / "new").write_text("two")
    os.utime(folder / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
    (folder / "new").rename(folder / "a.txt")


def delete(folder: Path) -> None:
    (folder / "a.txt").unlink()


@pytest.mark.parametrize("change", [append, replace_by_another_of_the_same_size_and_time, delete])
def test_what_was_read_of_a_folder_that_changed_meanwhile_is_not_published(change, two_folders, tmp_path):
    folder = Path(two_folders[0])

    def work(config: Keyed, inputs: Inputs, out: ArtifactWriter) -> Manifest:
        out.add_bytes("copy", inputs["model"].read("a.txt"))
        change(folder)
        return out.publish("files")

    with pytest.raises(InputError, match=f"--model {folder}: it was changed while it was read"):
        run_stage(Keyed(store=str(tmp_path / "store"), model=str(folder)), work)
    assert not list((tmp_path / "store").rglob("manifest.json"))


def link(folder: Path) -> None:
    os.link(folder / "a.txt", folder.parent / "backup")


def rewrite(folder: Path) -> None:
    content = (folder / "a.txt").read_text()
    (folder / "a.txt").write_text(content)


def add(folder: Path) -> None:
    """Which nobody has read: a cache of a program's, a store below the folder."""
    (folder / "b.txt").write_text("new")


@pytest.mark.parametrize("touch", [link, rewrite, add, lambda folder: (folder / "a.txt").chmod(0o600)])
def test_a_folder_whose_files_say_what_they_said_has_not_changed(touch, two_folders, tmp_path):
    folder = Path(two_folders[0])

    def work(config: Keyed, inputs: Inputs, out: ArtifactWriter) -> Manifest:
        out.add_bytes("copy", inputs["model"].read("a.txt"))
        touch(folder)
        return out.publish("files")

    assert run_stage(Keyed(store=str(folder / "store"), model=str(folder)), work).kind == "files"


def test_a_reference_that_must_be_one_may_hold_a_comma(tmp_path):
    (tmp_path / "a,b").mkdir()
    (tmp_path / "a,b" / "a.txt").write_text("one")
    assert Inputs(Keyed(store="/a", model=str(tmp_path / "a,b")))["model"].read("a.txt") == b"one"
    with pytest.raises(InputError, match=r"--model .*: nothing is there"):
        Inputs(Keyed(store="/a", model=f"{tmp_path / 'a,b'},{tmp_path}"))


def test_what_was_read_of_a_prefix_that_changed_meanwhile_is_not_published(s3_store):
    storage.write_bytes(f"{s3_store}/text/a.txt", b"one")

    def work(config: Keyed, inputs: Inputs, out: ArtifactWriter) -> Manifest:
        out.add_bytes("copy", inputs["model"].read("a.txt"))
        storage.write_bytes(f"{s3_store}/text/a.txt", b"two")
        return out.publish("files")

    with pytest.raises(InputError, match="it was changed while it was read"):
        run_stage(Keyed(store=f"{s3_store}/store", model=f"{s3_store}/text"), work)


def test_a_stage_reads_the_artifacts_that_its_key_was_made_of(two_folders, tmp_path):
    """A manifest that is replaced after the key was made is not what the stage reads."""
    first = ArtifactWriter(str(tmp_path / "store"), "made", "one")
    first.add_bytes("a.txt", b"one")
    given = first.publish("files")

    def work(config: Keyed, inputs: Inputs, out: ArtifactWriter) -> Manifest:
        storage.write_bytes(given.reference, b"another manifest")
        out.add_bytes("copy", inputs["model"].read("a.txt"))
        return out.publish("files")

    made = run_stage(Keyed(store=str(tmp_path / "store"), model=given.reference), work)
    assert made.inputs["model"].digest == given.digest


def test_kfp_finds_its_outputs_also_when_the_work_was_skipped(store, tmp_path):
    def work(config: Options, inputs: Inputs, out: ArtifactWriter) -> Manifest:
        out.add_bytes("report.html", b"<html>")
        out.metrics.update({"bits_per_byte": 1.25, "undefined": float("nan"), "endless": float("inf")})
        return out.publish("report")

    for folder in (tmp_path / "first", tmp_path / "second"):
        places = {name: str(folder / "deep" / name) for name in ("output", "reference", "report", "executor_output")}
        manifest = run_stage(Options(store=store, **places), work)
        copy = Manifest.from_json(Path(places["output"]).read_bytes(), "output")
        assert (copy.root, copy.digest) == (manifest.root, manifest.digest)
        assert Path(places["reference"]).read_text(encoding="utf-8") == manifest.reference
        assert Path(places["report"]).read_bytes() == b"<html>"
        executor = json.loads(Path(places["executor_output"]).read_text(encoding="utf-8"), parse_constant=pytest.fail)
        assert executor == {"artifacts": {"metrics": {"artifacts": [{"metadata": {"bits_per_byte": 1.25}}]}}}


def test_kfps_executor_input_names_the_place_of_the_output(store, tmp_path):
    def work(config: Options, inputs: Inputs, out: ArtifactWriter) -> Manifest:
        out.add_bytes("report.html", b"<html>")
        out.metrics.update({"loss": 2.5})
        return out.publish("report")

    given = json.dumps({"inputs": {}, "outputs": {"outputFile": str(tmp_path / "deep" / "metadata.json")}})
    run_stage(Options(store=store, executor_input=given), work)
    written = json.loads((tmp_path / "deep" / "metadata.json").read_text())
    assert written["artifacts"]["metrics"]["artifacts"] == [{"metadata": {"loss": 2.5}}]


@pytest.mark.parametrize("given", ["{{$}}", "[]", '{"outputs": {}}'])
def test_an_executor_input_that_is_none_is_refused_before_the_work(tmp_path, given):
    with pytest.raises(InputError, match=r"--executor-input: .*pass \{\{\$\}\} as it is"):
        run_stage(
            Options(store=str(tmp_path), executor_input=given),
            lambda config, inputs, out: pytest.fail("the work began"),
        )


def test_an_unwritable_store_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose another --store"):
        run_stage(Options(store=str(tmp_path / "file")), lambda config, inputs, out: pytest.fail("the work began"))


# --- a stage as a process ---------------------------------------------------------------------------------------------

STAGE = '''
"""An example stage: the mode says how it ends."""

import os, sys, signal, subprocess, time
from dataclasses import dataclass
from zhllama.stage.options import StageOptions
from zhllama.stage.run import main
from zhllama.errors import InputError, StorageFault

@dataclass(frozen=True, kw_only=True)
class Example(StageOptions):
    """An example stage."""
    mode: str = "done"
    """How it ends."""
    rest: tuple[str, ...] = ()
    """What follows `--`."""

def example(config, inputs, out):
    if config.mode == "input":
        raise InputError("the text: is wrong\\nin the second line; mend it")
    if config.mode == "storage":
        raise StorageFault("the server failed")
    if config.mode == "bug":
        raise RuntimeError("a bug, with " + os.environ["EXAMPLE_SECRET"])
    if config.mode == "interrupt":
        raise KeyboardInterrupt
    if config.mode == "full":
        raise OSError(28, "No space left on device", "/data/x")
    if config.mode == "pool":
        import multiprocessing
        with multiprocessing.get_context("fork").Pool(2) as pool:
            pool.map(abs, range(10))
    if config.mode == "fork":
        for _ in range(50):
            child = os.fork()
            if not child:
                signal.pause()
                os._exit(0)
            os.kill(child, signal.SIGTERM)
            if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != -signal.SIGTERM:
                raise RuntimeError("the child went on")
    if config.mode == "wait":
        with out.writer("half.bin") as stream:
            stream.write(b"x" * (17 * 2**20))
            print("waiting", flush=True)
            signal.pause()
    out.add_bytes("rest", " ".join(config.rest).encode())
    return out.publish("files")
'''

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def example(tmp_path: Path) -> list[str]:
    """A small stage, as a package of its own, and the command that runs it."""
    package = tmp_path / "code" / "example" / "ending"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "ending.py").write_text(STAGE)
    (package / "__main__.py").write_text(
        "from zhllama.stage.run import main\n"
        "from example.ending.ending import Example, example\n\n"
        "main(Example, example, rest='rest')\n"
    )
    return [sys.executable, "-m", "example.ending"]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": f"{tmp_path / 'code'}:{ROOT}",
        "EXAMPLE_SECRET": "correct-horse-battery",
        "ZHLLAMA_TERMINATION_LOG": str(tmp_path / "termination-log"),
    }


@pytest.fixture
def run(example: list[str], environment: dict[str, str], tmp_path: Path) -> Run:
    (tmp_path / "termination-log").touch()

    def started(*words: str) -> "subprocess.CompletedProcess[str]":
        command = [*example, *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    return started


@pytest.mark.parametrize(
    ("mode", "code", "last_line"),
    [
        ("input", 2, "error: the text: is wrong in the second line; mend it"),
        ("storage", 1, "fault: the server failed"),
        ("bug", 1, "fault: RuntimeError: a bug, with ***"),
        ("interrupt", 143, "cancelled"),
        (
            "full",
            2,
            "error: /data/x: no space left; free some, or point --store, TMPDIR or ZHLLAMA_CACHE elsewhere",
        ),
    ],
)
def test_how_it_ended_is_the_exit_code_the_last_line_and_the_termination_log(run, tmp_path, mode, code, last_line):
    ended = run("--store", str(tmp_path / "store"), "--mode", mode, "--reference", str(tmp_path / "ref"))
    assert ended.returncode == code
    assert ended.stderr.splitlines()[-1] == last_line
    assert (tmp_path / "termination-log").read_text() == last_line + "\n"
    assert ("Traceback" in ended.stderr) == (mode == "bug")
    assert "correct-horse-battery" not in ended.stderr
    assert not (tmp_path / "ref").exists()
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []


def test_done_is_code_0_and_a_reference(run, tmp_path):
    ended = run("--store", str(tmp_path / "store"), "--reference", str(tmp_path / "ref"), "--", "--two", "words")
    assert ended.returncode == 0, ended.stderr
    assert open_artifact((tmp_path / "ref").read_text()).read("rest") == b"--two words"
    assert (tmp_path / "termination-log").read_text() == ""


def test_wrong_options_are_code_2_and_one_line(run, tmp_path):
    ended = run("--store", str(tmp_path), "--moed", "done")
    assert ended.returncode == 2
    assert ended.stderr == "error: example.ending: there is no option --moed (did you mean --mode?); see --help\n"


def test_an_unknown_log_level_is_code_2_and_one_line(run, environment, tmp_path):
    environment["ZHLLAMA_LOG"] = "loud"
    ended = run("--store", str(tmp_path))
    assert ended.returncode == 2
    assert ended.stderr == "error: ZHLLAMA_LOG=LOUD: no such level; use DEBUG, INFO, WARNING or ERROR\n"


def test_help_names_the_command_and_says_what_options_are_for(run):
    ended = run("--help")
    assert ended.returncode == 0
    assert ended.stdout.startswith("usage: python -m example.ending")
    assert "How it ends." in ended.stdout


def test_workers_that_end_with_their_pool_say_nothing(run, tmp_path):
    ended = run("--store", str(tmp_path / "store"), "--mode", "pool")
    assert ended.returncode == 0
    assert "cancelled" not in ended.stderr
    assert (tmp_path / "termination-log").read_text() == ""


def test_a_forked_child_that_is_ended_ends_at_once_whatever_it_is_doing(run, tmp_path):
    ended = run("--store", str(tmp_path / "store"), "--mode", "fork")
    assert ended.returncode == 0, ended.stderr
    assert "cancelled" not in ended.stderr


def start_waiting(example: list[str], environment: dict[str, str], store: str) -> "subprocess.Popen[str]":
    command = [*example, "--store", store, "--mode", "wait"]
    waiting = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == "waiting\n"
    return waiting


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_cancelled_stage_ends_with_143_and_leaves_nothing(example, environment, tmp_path, store, number):
    (tmp_path / "termination-log").touch()
    environment |= {name: os.environ[name] for name in os.environ if name.startswith(("AWS_", "ZHLLAMA_S3"))}
    waiting = start_waiting(example, environment, store)
    os.kill(waiting.pid, number)
    _, said = waiting.communicate(timeout=120)
    assert waiting.returncode == 143
    assert said.splitlines()[-1] == "cancelled"
    assert (tmp_path / "termination-log").read_text() == "cancelled\n"
    assert storage.listing(store) == []
    if storage.is_s3(store):
        uploads = current_session().client.list_multipart_uploads(Bucket="tests", Prefix=storage.split_s3(store)[1])
        assert not uploads.get("Uploads")
    else:
        assert [path for path in Path(store).rglob("*") if path.is_file()] == []


def test_a_cancel_while_the_options_are_read_is_no_fault_of_theirs(monkeypatch):
    def terminated(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, program._terminated)
    try:
        monkeypatch.setattr("tyro.cli", terminated)
        with pytest.raises(SystemExit) as ended:
            parse(StageOptions, ["--store", "s"])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 143


# --- forward ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Machined:
    """Options with a machine."""

    machine: str = ""
    memory: str = "8Gi"
    nodes: int = 1
    labels: str = ""
    elastic: bool = False


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--machine", '{"memory": "64Gi", "nodes": 2}'], ("64Gi", 2, "", False)),
        (['--machine={"labels": {"a": "b"}, "elastic": true}'], ("8Gi", 1, '{"a": "b"}', True)),
        (["--machine", '{"memory": "64Gi"}', "--memory", "9Gi"], ("9Gi", 1, "", False)),
        (["--memory=9Gi", "--machine", '{"memory": "64Gi", "nodes": 3}'], ("9Gi", 3, "", False)),
        (["--machine", ""], ("8Gi", 1, "", False)),
    ],
    ids=["options", "values of all kinds", "what is given by itself wins", "in any order", "none"],
)
def test_a_machine_is_options_as_one_json_object(arguments, found):
    told = parse(Machined, arguments)
    assert (told.memory, told.nodes, told.labels, told.elastic) == found


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        ("{", "--machine {: not JSON"),
        ("[1]", r"--machine \[1\]: write options by name"),
        ('{"memroy": "1Gi"}', r"there is no option --memroy \(did you mean --memory\?\)"),
        ('{"nodes": "many"}', "nodes"),
    ],
)
def test_a_wrong_machine_is_one_line(machine, said):
    with pytest.raises(InputError, match=said):
        parse(Machined, ["--machine", machine])


def test_a_reader_that_goes_away_ends_the_program_quietly():
    program = "from zhllama.stage.program import guarded\nguarded(lambda: [print('x' * 1000) for _ in range(10_000)])"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait(60) == 141
