"""GitHub's workflows: valid, their actions pinned by commit, nobody's registry in them, nothing published unscanned."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yaml"))
every_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def steps(path: Path) -> list[dict]:
    return [step for job in yaml.safe_load(path.read_text())["jobs"].values() for step in job["steps"]]


@pytest.fixture(scope="module")
def release() -> list[dict]:
    return steps(ROOT / ".github" / "workflows" / "images.yaml")


def run(program: str, *arguments: object) -> None:
    """A tool of the dev extra, beside this Python."""
    command = [str(Path(sys.executable).with_name(program)), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@every_workflow
def test_a_workflow_has_the_form_that_github_reads(path):
    run("check-jsonschema", "--builtin-schema", "vendor.github-workflows", path)


@every_workflow
def test_zizmor_finds_no_hole(path):
    """Unpinned actions, more permissions than needed, text of others run as a script, credentials left behind."""
    run("zizmor", "--offline", "--no-progress", path)


@every_workflow
def test_an_action_is_pinned_by_its_commit_and_says_its_version(path):
    used = re.findall(r"uses: (.*)", path.read_text())
    assert used
    for action in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action)


@every_workflow
def test_a_script_of_a_workflow_is_sound(path):
    """As bash reads it; and what comes from GitHub comes through the environment."""
    for script in (step["run"] for step in steps(path) if "run" in step):
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "${{" not in script


@every_workflow
def test_a_workflow_names_no_host(path):
    """Where images go is a setting of the repository."""
    code = re.sub(r"#.*", "", path.read_text())
    assert not re.findall(r"[\w-]+\.(?:io|com|org|net|dev)\b", code)


def test_ci_runs_what_a_change_must_pass():
    assert "bash .ci/run" in [step.get("run") for step in steps(ROOT / ".github" / "workflows" / "ci.yaml")]


def test_nothing_gets_the_releases_tag_before_it_is_scanned_and_signed(release):
    names = [step.get("name") for step in release]
    assert names.index("Build") < names.index("Scan") < names.index("Sign")
    assert names[-1] == "Publish under the release's tag"
    build = release[names.index("Build")]
    assert build["with"]["push"] is True
    assert build["env"]["TAG"] == "${{ env.CANDIDATE }}"
    assert build["env"]["ATTEST"] == "true"
    assert "--exit-code 1" in release[names.index("Scan")]["run"]
    assert not [step for step in release if step.get("continue-on-error")]
