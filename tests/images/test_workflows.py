"""GitHub's workflows: nobody's registry in them, nothing published unscanned. Their form and their holes: make lint."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yaml"))


def steps(path: Path) -> list[dict]:
    return [step for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values() for step in job["steps"]]


@pytest.fixture(scope="module")
def release() -> list[dict]:
    return steps(ROOT / ".github" / "workflows" / "images.yaml")


def test_every_action_is_pinned_by_its_commit_and_says_its_version():
    for path in WORKFLOWS:
        used = re.findall(r"uses: (.*)", path.read_text())
        assert used
        for action in used:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), path.name


def test_every_script_of_a_workflow_is_sound():
    """As bash reads it; and what comes from GitHub comes through the environment."""
    for script in (step["run"] for path in WORKFLOWS for step in steps(path) if "run" in step):
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "${{" not in script


def test_no_workflow_names_a_host():
    """Where images go is a setting of the repository."""
    for path in WORKFLOWS:
        code = re.sub(r"#.*", "", path.read_text())
        assert not re.findall(r"[\w-]+\.(?:io|com|org|net|dev)\b", code), path.name


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
