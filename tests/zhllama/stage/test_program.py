"""The process around a command: text is UTF-8 whatever the locale says, and a full disk is named, however wrapped."""

import getpass
import os
import subprocess
import sys
import time

import pytest

from zhllama.errors import InputError
from zhllama.stage.program import bounded

PLAIN = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}


def run(body: str, typed: bytes = b"", **environment: str) -> "subprocess.CompletedProcess[bytes]":
    program = (
        f"import sys\nfrom pathlib import Path\nfrom zhllama.stage.program import guarded\n\ndef work():\n{body}\n"
    )
    words = [sys.executable, "-c", program + "guarded(work)", "参数"]
    return subprocess.run(words, input=typed, capture_output=True, env=PLAIN | environment, check=False)


ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@pytest.mark.parametrize(
    "environment", [ASCII, {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "gbk"}, {**ASCII, "PYTHONIOENCODING": "gbk"}],
    ids=["ASCII", "GBK streams", "both"],
)  # fmt: skip
def test_what_is_read_and_said_is_utf8_whatever_the_locale(tmp_path, environment):
    (tmp_path / "a.txt").write_text("长江", encoding="utf-8")
    # a library's open has no encoding
    body = f"    print(open('{tmp_path}/a.txt').read(), input(), sys.argv[1], '\\ud83d', file=sys.stdout)"
    ended = run(body, "黄河\n".encode(), **environment)
    assert (ended.returncode, ended.stdout.decode()) == (0, "长江 黄河 参数 \\ud83d\n"), ended.stderr


def test_the_programs_that_it_starts_are_in_utf8_too():
    body = "    import subprocess\n    subprocess.run([sys.executable, '-c', 'print(chr(0x957f))'], check=True)"
    assert run(body, **ASCII).stdout.decode() == "长\n"


def test_a_python_that_ignores_the_environment_does_not_begin_for_ever():
    program = "from zhllama.stage.program import guarded; guarded(lambda: print('长江'))"
    ended = subprocess.run([sys.executable, "-E", "-c", program], capture_output=True, env=PLAIN | ASCII, check=True)
    assert ended.stdout.decode() == "长江\n"


@pytest.mark.parametrize("closed", ["<&-", ">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_stream_that_is_closed_holds_nothing_up_and_no_file_takes_its_place(closed, tmp_path):
    body = f"""    import subprocess
    with open('{tmp_path}/a.txt', 'w') as file:
        print('said', sys.stdout.isatty())
        subprocess.run(['echo', 'more'], check=True)
        print('wrong', file=sys.stderr)
        file.write('长江' + sys.stdin.read())
"""
    program = f"import sys\nfrom zhllama.stage.program import guarded\ndef work():\n{body}\nguarded(work)"
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    words = f"{sys.executable} {tmp_path}/program.py {closed}"
    there = {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(words, shell=True, input=b"", capture_output=True, env=PLAIN | there, check=False)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "长江"


@pytest.mark.parametrize(
    ("raised", "line"),
    [
        ("OSError(28, 'full', '/tmp/x')", b"error: /tmp/x: no space left; free some"),
        ("FileNotFoundError(2, 'No usable temporary directory found in [/tmp]')", b"none of them can be written; free"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_disk_is_wrong_input_however_a_library_wraps_it(raised, line, wrapped):
    body = f"    raise RuntimeError('cannot write') from {raised}" if wrapped else f"    raise {raised}"
    ended = run(body)
    assert ended.returncode == 2
    assert line in ended.stderr
    assert ended.stderr.count(b"\n") == 1


def test_what_takes_too_long_is_stopped():
    began = time.monotonic()
    with pytest.raises(InputError, match="it does not end"), bounded(0.05, "it does not end"):
        time.sleep(60)
    assert time.monotonic() - began < 5
    with bounded(0.05, "x"):
        pass
    time.sleep(0.06)


@pytest.mark.slow
def test_torch_makes_no_folder_where_another_user_may_have_a_file_of_its_name(tmp_path):
    (tmp_path / "temporary").mkdir()
    (tmp_path / "temporary" / f"torchinductor_{getpass.getuser()}").write_text("another's")
    places = {"TMPDIR": str(tmp_path / "temporary"), "HOME": str(tmp_path), "XDG_CACHE_HOME": ""}
    ended = run("    import torch._dynamo", **places)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / ".cache" / "torch" / "inductor").is_dir()


def test_what_torch_compiles_lies_where_it_is_said_and_nothing_is_made_without_a_home(tmp_path):
    body = "    import os\n    print(os.environ.get('TORCHINDUCTOR_CACHE_DIR'))"
    (tmp_path / "file").touch()
    for said, home, found in (({"TORCHINDUCTOR_CACHE_DIR": "/x"}, tmp_path, "/x"), ({}, tmp_path / "file", "None")):
        ended = run(body, HOME=str(home), XDG_CACHE_HOME="", **said)
        assert ended.stdout.decode().strip() == found
