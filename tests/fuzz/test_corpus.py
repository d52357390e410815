"""Every reader ends well, or with one line, on good files and on those that one fell over before (make fuzz)."""

import pytest

from tests.fuzz.judged import CORPUS, files, judged
from tests.fuzz.readers import TARGETS

each = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.gguf] * (name == "gguf")) for name in TARGETS]
)


@each
def test_a_reader_holds_on_its_corpus(name, caplog):
    caplog.set_level("CRITICAL")
    assert [wrong for content in files(name) if (wrong := judged(TARGETS[name], content))] == []


@each
def test_a_reader_takes_a_good_file(name, tmp_path):
    content, *_ = TARGETS[name].seeds() or [(CORPUS / name / "good.yaml").read_bytes()]
    TARGETS[name].read(content, tmp_path)


def test_every_corpus_is_of_a_reader_and_small():
    assert {folder.name for folder in CORPUS.iterdir()} <= TARGETS.keys()
    assert max(path.stat().st_size for path in CORPUS.rglob("*")) < 20_000
