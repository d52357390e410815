"""What `make compat` calls a difference; the programs themselves are tried by that command alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.compat.__main__ import main
from tests.compat.artifacts import PROBE, SPELLED, Said, probe_lines
from tests.compat.comparison import Comparison
from tests.compat.programs import PROGRAMS
from tests.compat.table import page, section, sections

OURS = Said(
    ids=[[1, 5]], chats=[[1, 6]], logits=[np.zeros((2, 4)), np.zeros((2, 4))], answers=[[3, 2]],
    chosen=[[-1.4, -1.4]], spoken=["好"], likelihood=[-2.0], template="",
)  # fmt: skip


def row(tmp_path, known=None, ours=OURS, what="folder", **seen):
    for name in ("logits", "next", "chosen"):
        if name in seen:
            np.savez(tmp_path / f"{name}.npz", *seen[name])
            seen[name] = str(tmp_path / f"{name}.npz")
    comparison = Comparison({}, {"merged": ours}, tmp_path)
    (found,) = comparison.rows({"seen": [{"what": what, "of": "merged", **seen}]}, known or {})
    return found


def test_what_is_equal_is_told_in_figures(tmp_path):
    found = row(tmp_path, ids=[[1, 5]], chats=[[1, 6]], logits=OURS.logits, spoken=["好"], chosen=[[-1.4]])
    assert (found.differs, found.result) == (False, "ids 1/1, chats 1/1, spoken 1/1, logits ±0.0e+00, chosen ±0.0e+00")


@pytest.mark.parametrize(
    "seen",
    [
        {"ids": [[1, 4]]},
        {"spoken": [" 好"]},
        {"logits": [np.zeros((2, 4)), np.full((2, 4), 0.1)]},
        {"logits": [np.zeros((2, 4)), np.array([[0, 0, 0, np.nan]] * 2)]},
        {"logits": [np.zeros((2, 4)), np.zeros((2, 5))]},
    ],
    ids=["an id", "a space before", "a logit", "NaN", "another shape"],
)
def test_a_difference_is_one(tmp_path, seen):
    assert row(tmp_path, **seen).differs


@pytest.mark.parametrize(("most", "differs"), [(0.0, False), (3e-7, False), (2e-6, True), (float("nan"), True)])
def test_a_merge_may_differ_in_its_last_bits(tmp_path, most, differs):
    found = row(tmp_path, tensors=[3, 4, most])
    assert (found.differs, found.result.split(", ")[0]) == (differs, "our merge: 3/4 tensors to the bit")


def test_a_known_difference_comes_with_its_reason(tmp_path):
    found = row(tmp_path, {"folder": "it reads unigrams"}, ids=[[1, 4]])
    assert (found.differs, found.result) == (False, "it reads unigrams: ids 0/1")


def test_a_model_with_a_probe_is_held_to_it(tmp_path):
    ours = replace(OURS, probe=[[at] for at in range(2000)])
    found = row(tmp_path, ours=ours, ids=[[1, 5]], probe=ours.probe)
    assert (found.differs, found.result) == (False, "ids 1/1, probe 2,000/2,000")
    found = row(tmp_path, ours=ours, ids=[[1, 5]], probe=[*ours.probe[:-1], [0]])
    assert (found.differs, found.result) == (True, "ids 1/1, probe 1,999/2,000")
    assert row(tmp_path, ids=[[1, 5]], probe=[]).result == "ids 1/1"


def test_a_gguf_has_no_rows_without_a_token(tmp_path):
    ours, theirs = replace(OURS, pieces=3), [np.zeros((2, 3)), np.zeros((2, 3))]
    assert not row(tmp_path, ours=ours, what="GGUF f32", logits=theirs).differs
    assert row(tmp_path, ours=ours, logits=theirs).differs


def test_the_probe_is_large_and_of_every_kind():
    lines = probe_lines()
    assert len(set(lines)) == len(lines) >= PROBE
    assert "" not in lines
    for text in (*SPELLED, "的" * 500, "🤗", "\u0301", "\t", "    def "):
        assert any(text in line for line in lines), text


def test_the_page_keeps_the_rows_of_programs_that_are_not_tried():
    before = Path("docs/compatibility.md").read_text(encoding="utf-8")
    assert page(list(sections(before).values())) == before
    assert list(sections(before)) == [program.name for program in PROGRAMS]


def test_bytes_that_are_no_character_may_be_marked_or_left_out(tmp_path):
    ours = replace(OURS, spoken=["好\ufffd了"])
    assert not row(tmp_path, ours=ours, spoken=["好了"]).differs
    assert row(tmp_path, ours=ours, spoken=["好"]).differs


def test_a_known_difference_may_be_one_models(tmp_path):
    for tried, differs in (("folder: merged", False), ("folder: other", True)):
        assert row(tmp_path, {tried: "no NFC"}, ids=[[1, 4]]).differs == differs


def test_an_error_is_a_row(tmp_path):
    found = row(tmp_path, error="ValueError: no | here")
    assert "| folder: merged | error: ValueError: no \\| here |" in section(PROGRAMS[0], {"torch": "2"}, [found])


def test_every_programs_script_is_there():
    inside = Path(__file__).parent / "compat" / "inside"
    assert [program.name for program in PROGRAMS if not (inside / program.script).is_file()] == []


def test_an_unknown_program_is_named():
    with pytest.raises(SystemExit, match="nothing: no such program; there are transformers"):
        main(["nothing"])
