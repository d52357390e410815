"""The README's commands are commands: targets, subcommands, options and folders that exist."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from pipelines.__main__ import parser

ROOT = Path(__file__).resolve().parents[1]


def commands() -> list[list[str]]:
    """Every command line of the indented and fenced blocks, comments taken off."""
    text = re.sub(r"```mermaid.*?```", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    return [shlex.split(line, comments=True) for line in lines if re.match(r"(make|zhllama|python|kubectl) ", line)]


COMMANDS = commands()


def of(program: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("words", [words for words in COMMANDS if words[0] == program], ids=" ".join)


def test_the_two_commands_come_first():
    assert COMMANDS[:2] == [["make", "demo"], ["make", "test"]]


@of("make")
def test_make_has_the_target(words):
    tried = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert tried.returncode == 0, tried.stderr


@of("zhllama")
def test_zhllama_has_the_command_and_its_options(words):
    parser().parse_args(words[1:])


@of("python")
def test_a_stage_named_alone_is_there(words):
    assert words[1] == "-m"
    folder = ROOT.joinpath(*words[2].split("."))
    assert (folder / "__main__.py").is_file()


@of("kubectl")
def test_kubectl_applies_a_folder_that_is_there(words):
    assert words[1:3] == ["apply", "-k"]
    assert (ROOT / words[3] / "kustomization.yaml").is_file()


@pytest.mark.parametrize(
    "path",
    sorted({*re.findall(r"`((?:k8s|pipelines|tests|images|components)/[\w./-]+)`", (ROOT / "README.md").read_text())}),
)
def test_a_file_that_the_readme_names_is_there(path):
    assert (ROOT / path).exists()
