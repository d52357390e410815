"""zhllama: what it prints, how it ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from kfp import dsl

from pipelines.cli.options import settings
from zhllama.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


def zhllama(*words: object, **more) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **more)


def test_help_names_the_commands():
    ended = zhllama("--help")
    assert ended.returncode == 0
    assert {"run", "chat", "compile", "parameters", "submit"} <= set(ended.stdout.split())


IMPORTED = """
import sys
from pipelines.__main__ import main
try:
    main()
except SystemExit:
    heavy = {"kfp", "torch", "transformers", "boto3", "rich", "kubernetes", "pipelines.machines", "pipelines.settings"}
    print(sorted(heavy & set(sys.modules)))
"""


@pytest.mark.parametrize("words", ["--help", "run --help", "compile --help", "submit --help"])
def test_help_imports_nothing_heavy(words):
    ended = subprocess.run([sys.executable, "-c", IMPORTED, *words.split()], capture_output=True, text=True)
    assert ended.stdout.splitlines()[-1] == "[]", ended.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compile", "--size", "14b", "-o", "x.yaml"], "there is no size '14b' (did you mean 13b?)"),
        (["run", "--size", "tinny"], "there is no size 'tinny' (did you mean tiny?)"),
        (["run", "--set", "stor=a"], "--set stor: the pipeline has no such parameter (did you mean store?)"),
        (["run", "--set", "store"], "--set store: write NAME=VALUE"),
        (["run", "--set", "lora_steps=many"], "--set lora_steps: 'many' where a whole number is needed"),
        (["compile", "--size", "tiny", "--set", "digests=/none", "-o", "p.yaml"], "--set digests /none: it cannot be"),
        (["check", "--namespace", "A_b", "x.yaml"], "--namespace: 'A_b'"),
        (["run", "--set", "deploy=kserv"], "--set deploy: 'kserv' (did you mean kserve?); use none or kubernetes"),
        (["compile", "--size", "tiny", "-o", "pipeline"], "pipeline: kfp writes a pipeline with its settings as YAML"),
        (
            ["compile", "--size", "tiny", "-o", "p.json"],
            "p.json: kfp writes a pipeline with its settings as YAML alone",
        ),
        (["run", "--set", "store=out", "--until", "merge"], "--until merge: there is no such step"),
        (["run", "--package", "none.yaml"], "none.yaml: No such file or directory"),
        (["run", "--parallel", "0"], "--parallel 0: at least one step has to run"),
        (["chat"], "no run has been here; start one with: zhllama run"),
        (["chat", "--work", "file"], "--work file: no run has been here"),
        (["demo", "--work", "file"], "/file: File exists; choose another folder"),
        (["demo", "--work", "file/work"], "/file/work: Not a directory; choose another folder"),
        (["demo", "--text", "none"], "--text none: nothing is there"),
        (
            ["plan", "--size", "13b", "--gpuu", "x"],
            "--gpuu: not known here (did you mean --gpu?); see zhllama plan --help",
        ),
        (["status"], "the following arguments are required: RUN; see zhllama status --help"),
        (["sumbit"], "invalid choice: 'sumbit'"),
        (["ls", "--a\x1b[2Jb"], r"--a\u001b[2Jb: not known here"),
        (["render", "serving", "--size", "7b", "more"], "more: not known here; see zhllama render serving --help"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line_and_exit_2(tmp_path, words, said):
    (tmp_path / "file").touch()
    ended = zhllama(*words, cwd=tmp_path)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert not list(tmp_path.glob("p*"))


def test_settings_are_pairs_and_each_is_given_once():
    assert settings(["a=b=c", "d="]) == {"a": "b=c", "d": ""}
    with pytest.raises(InputError, match="--set a: given twice"):
        settings(["a=1", "a=2"])


def test_run_goes_on_with_the_command_that_it_names(compiled, steps, tmp_path):
    @dsl.pipeline(name="test")
    def pipeline(store: str, value: str):
        done = steps.publish(store=store, value=value)
        steps.fail(value="no good", code=2).after(done)

    path = compiled(pipeline)
    words = [
        "run",
        "--package",
        path,
        "--work",
        tmp_path / "work",
        "--set",
        f"store={tmp_path / 'store'}",
        "--set",
        "value=a b",
        "--until",
        "fail",
        "--parallel",
        "1",
    ]
    ended = zhllama(*words)
    assert ended.returncode == 2
    said = ended.stdout.splitlines()
    assert "fail failed with exit code 2. Its last lines:" in said
    assert "  error: no good" in said
    (again,) = [line for line in said if line.startswith("to go on: ")]
    assert "--set 'value=a b'" in again
    assert "--until fail --parallel 1" in again
    command = again.removeprefix("to go on: zhllama ").removesuffix(" (what is done is kept)")
    shell = f"{sys.executable} -m pipelines {command}"
    assert "publish unchanged" in subprocess.run(shell, shell=True, capture_output=True, text=True).stdout


def test_the_images_of_a_compiled_pipeline_are_where_they_were_said_to_be(tmp_path):
    ended = zhllama(
        "compile", "--size", "7b", "--registry", "r.example.com/team", "--tag", "1.2", "-o", tmp_path / "p.yaml"
    )
    assert ended.returncode == 0
    images = {line.split("image: ")[1] for line in (tmp_path / "p.yaml").read_text().splitlines() if " image: " in line}
    assert "r.example.com/team/zhllama-convert-weights:1.2" in images
    assert all(image.startswith("r.example.com/team/zhllama-") and image.endswith(":1.2") for image in images)


def test_a_pipeline_that_does_not_fit_on_the_disk_is_one_line_and_leaves_the_one_before(tmp_path):
    (tmp_path / "p.yaml").write_text("before")
    # a file may have four kB, as where so many are left
    script = 'ulimit -f 8 && exec "$@"'
    words = [sys.executable, "-m", "pipelines", "compile", "--size", "tiny", "-o", "p.yaml"]
    ended = subprocess.run(["sh", "-c", script, "sh", *words], cwd=tmp_path, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (2, "error: p.yaml: File too large; choose another place\n")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("p.yaml", "before")]


STAGES = sorted(path.parent.name.replace("_", "-") for path in (ROOT / "components").glob("*/__main__.py"))


def test_a_compiled_pipeline_has_what_it_was_told_where_kfp_takes_no_parameter(tmp_path):
    digest = "sha256:" + "1" * 64
    (tmp_path / "images.txt").write_text("".join(f"r.example.com/zhllama-{stage} {digest}\n" for stage in STAGES))
    ended = zhllama(
        "compile", "--size", "tiny", "--registry", "r.example.com", "--digests", tmp_path / "images.txt",
        "--run-as-user", "none", "--label", "team=nlp", "--annotation", "a.b/c=d e", "--pull-policy", "Always",
        "-o", tmp_path / "p.yaml",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    spec, platform = yaml.load_all((tmp_path / "p.yaml").read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    executors = spec["deploymentSpec"]["executors"]
    for name, found in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].items():
        container = executors[name]["container"]
        assert container["image"].startswith("r.example.com/zhllama-")
        assert container["image"].endswith(f"@{digest}")
        assert found["securityContext"] == {"runAsNonRoot": True}
        assert found["podMetadata"]["labels"]["team"] == "nlp"
        assert found["podMetadata"]["annotations"] == {"a.b/c": "d e"}
        assert found["imagePullPolicy"] == "Always"
        # those that name an image when they run do so as this compilation did
        told = {item["name"]: item["value"] for item in container.get("env", ()) if item["name"].startswith("ZHLLAMA_")}
        names_images = name in ("exec-train-embeddings", "exec-train-lora", "exec-train-sft", "exec-deploy")
        assert told.get("ZHLLAMA_REGISTRY") == ("r.example.com" if names_images else None)
        assert (f"pretrain={digest}" in told.get("ZHLLAMA_DIGESTS", "")) == names_images


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--run-as-user", "0"], "--run-as-user 0: write a number from 1 to 2147483647 (0, root, is refused), or none"),
        (["--run-as-user", "nobody"], "--run-as-user nobody: write a number from 1"),
        (["--label", "team"], "--label team: write NAME=VALUE"),
        (["--label", "team=a b"], "--label: team: 'a b' must be empty, or letters, digits"),
        (["--annotation", "a b=c"], "--annotation: key 'a b' must be letters, digits"),
        (["--digests", "/none"], "--digests /none: it cannot be read"),
        (
            ["--registry", "https://r.example.com/team"],
            "registry: 'https://r.example.com/team' is no registry; write a host and a path",
        ),
        (["--registry", "r.example.com/Team"], "registry: 'r.example.com/Team' is no registry"),
        (["--registry", "Reg/x"], "registry: 'Reg/x' is no registry; write a host and a path in lower case"),
        (["--tag", "1.0+cpu"], "tag: '1.0+cpu' is no tag: letters, digits, _ . and - are allowed"),
    ],
)
def test_what_a_cluster_would_refuse_is_refused_before_it_is_compiled(tmp_path, words, message):
    ended = zhllama("compile", "--size", "tiny", *words, "-o", tmp_path / "p.yaml")
    assert (ended.returncode, (tmp_path / "p.yaml").exists()) == (2, False)
    assert message in ended.stderr


@pytest.mark.parametrize(
    ("option", "value", "setting"),
    [
        ("--run-as-user", "1000", "run_as_user=2"),
        ("--digests", "/none", "digests=/other"),
        ("--label", "a=b", "step_labels={}"),
    ],
)
def test_what_is_said_twice_is_refused_by_both_names(tmp_path, option, value, setting):
    ended = zhllama("compile", "--size", "tiny", option, value, "--set", setting, "-o", tmp_path / "p.yaml")
    assert ended.returncode == 2
    assert f"--set {setting.partition('=')[0]}: it is given by {option} too; keep one" in ended.stderr


def test_parameters_lists_defaults_of_the_size():
    said = zhllama("parameters", "--size", "13b", env={**os.environ, "COLUMNS": "200"}).stdout
    lines = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line.strip()}
    assert lines["store"] == [
        "run",
        "text",
        "(required)",
        "Where",
        "everything",
        "is",
        "put:",
        "an",
        "s3://",
        "prefix.",
    ]
    assert lines["lora_learning_rate"] == ["run", "number", "0.0001", "LoRA:", "peak", "learning", "rate."]
    assert lines["size"][:3] == ["compile", "text", "13b"]


def test_chat_answers_with_the_model_of_the_last_run(tmp_path, tiny_model):
    work = tmp_path / "work"
    work.mkdir()
    step = {"stage": "evaluate", "inputs": {"model": tiny_model}, "reference": "", "kind": "report"}
    (work / "run.json").write_text(json.dumps({"steps": {"evaluate": step}}))
    ended = zhllama("chat", "--work", work, input="hello\n")
    assert ended.returncode == 0, ended.stderr
