"""A file that ends llama.cpp or keeps it for ever: one line, and whoever asked lives."""

from pathlib import Path

import pytest

from components.serve import gguf_ids
from components.serve.gguf_ids import ids_of


def stands_in(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """For llama.cpp, in the child: what a hostile file makes of it."""
    (folder / "llama_cpp.py").write_text(f"import os, sys, time\n{code}\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("os.kill(os.getpid(), 11)", "it ended: Segmentation fault"),
        ("os.abort()", "it ended: Aborted"),
        ("raise ValueError('no model\\n')", "ValueError: no model"),
        ("sys.exit(3)", "it said nothing"),
        ("print('[]')\nos._exit(0)", "it told the ids of 0 texts, not of 1"),
        ("os._exit(0)", "it told the ids of 0 texts, not of 1"),
        ("time.sleep(600)", "it did not end within 2 s"),
    ],
)
def test_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, said: str) -> None:
    stands_in(tmp_path, monkeypatch, code)
    monkeypatch.setattr(gguf_ids, "READING_SECONDS", 2.0 if "sleep" in code else 60.0)
    with pytest.raises(ValueError, match=said) as error:
        ids_of(tmp_path / "m.gguf", [("text", False)])
    assert "\n" not in str(error.value)
