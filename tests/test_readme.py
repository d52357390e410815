"""The README's commands are commands: targets, subcommands, options and folders that exist; docs' stages have options
that exist. The Chinese README has the same sections, commands, tables and files as the English one."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from pipelines.__main__ import parser
from tests.stage_options import options_of

ROOT = Path(__file__).resolve().parents[1]
ENGLISH, CHINESE = ((ROOT / name).read_text("utf-8") for name in ("README.md", "README.zh-CN.md"))


def commands(text: str) -> list[list[str]]:
    """Every command line of the indented and fenced blocks, comments taken off."""
    text = re.sub(r"```mermaid.*?```", "", text, flags=re.DOTALL)
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    return [shlex.split(line, comments=True) for line in lines if re.match(r"(make|zhllama|python|kubectl) ", line)]


COMMANDS = commands(ENGLISH)


def of(program: str) -> list[list[str]]:
    found = [words for words in COMMANDS if words[0] == program]
    assert found, f"the README names no command of {program}"
    return found


def test_the_two_commands_come_first():
    assert COMMANDS[:2] == [["make", "demo"], ["make", "test"]]


def test_make_has_the_targets():
    for words in of("make"):
        tried = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
        assert tried.returncode == 0, f"{shlex.join(words)}: {tried.stderr}"


def test_zhllama_has_the_commands_and_their_options(capsys):
    for words in of("zhllama"):
        try:
            parser().parse_args(words[1:])
        except SystemExit:
            pytest.fail(f"{shlex.join(words)}: {capsys.readouterr().err}")


def test_a_stage_named_alone_is_there():
    for words in of("python"):
        assert words[1] == "-m"
        assert ROOT.joinpath(*words[2].split("."), "__main__.py").is_file(), shlex.join(words)


def stage_commands() -> list[tuple[str, str, list[str]]]:
    """(file, stage, options) of every command line that runs a stage, in the README and in docs."""
    found = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text().replace("\\\n", " ")
        for stage, rest in re.findall(r"^ *python -m components\.(\w+)(.*)$", text, flags=re.MULTILINE):
            words = shlex.split(rest, comments=True)
            found.append((path.name, stage, [word.partition("=")[0] for word in words if word.startswith("--")]))
    return found


def test_a_stage_has_the_options_that_a_page_gives_it():
    assert stage_commands()
    for page, stage, options in stage_commands():
        assert options, f"{page}: {stage} without an option"
        unknown = set(options) - {f"--{name.replace('_', '-')}" for name in options_of(stage)}
        assert not unknown, f"{page}: {stage} has no {sorted(unknown)}"


def test_kubectl_applies_folders_that_are_there():
    for words in of("kubectl"):
        assert words[1:3] == ["apply", "-k"]
        assert (ROOT / words[3] / "kustomization.yaml").is_file(), shlex.join(words)


def test_the_files_that_the_readme_names_are_there():
    paths = {*re.findall(r"`((?:k8s|pipelines|tests|images|components|zhllama)/[\w./-]+)`", ENGLISH)}
    assert paths
    assert sorted(path for path in paths if not (ROOT / path).exists()) == []


# --- the Chinese README -----------------------------------------------------------------------------------------------


def headings(text: str) -> list[str]:
    """`#` marks of each heading, in order; what follows them is in the language of the page."""
    return re.findall(r"^(#+) ", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)


def sections(text: str) -> list[str]:
    return re.split(r"^#+ ", text, flags=re.MULTILINE)


def code_of_rows(text: str) -> list[list[str]]:
    """What stands in backticks, row by row of all tables."""
    return [re.findall(r"`([^`]+)`", line) for line in text.splitlines() if line.startswith("|")]


def named(text: str) -> set[str]:
    """Files of docs, and everything in backticks that is no sentence."""
    return {*re.findall(r"\bdocs/[\w.-]+\w", text), *re.findall(r"`([^`\n]+)`", text)}


def test_both_readmes_have_the_same_headings():
    assert headings(CHINESE) == headings(ENGLISH)


def test_sections_have_the_same_commands_tables_and_names_in_both():
    for number, (english, chinese) in enumerate(zip(sections(ENGLISH), sections(CHINESE), strict=True)):
        where = f"section {number}: {english.partition(chr(10))[0]}"
        assert commands(chinese) == commands(english), where
        assert code_of_rows(chinese) == code_of_rows(english), where
        assert named(chinese) == named(english), where
        printed = [re.findall(r"```text.*?```", text, flags=re.DOTALL) for text in (chinese, english)]
        assert printed[0] == printed[1], where
