"""Folders, locks and what lies in TMPDIR for a while, on a machine with another user who wants in."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.other_user import STRANGER, as_stranger, root_alone
from zhllama import storage
from zhllama.artifacts.cache import cache_folder
from zhllama.errors import InputError
from zhllama.storage.private import TEMPORARY, open_lock, own_folder, own_part_of, temporary_folder, write_private

MEND = "choose another"


@pytest.fixture
def open_to_all(tmp_path: Path) -> Path:
    """A folder as /tmp: everybody may write, and remove what is one's own."""
    path = tmp_path / "tmp"
    path.mkdir()
    path.chmod(0o1777)
    for parent in path.parents:
        if parent.stat().st_uid == os.geteuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    return path


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_a_folder_of_ones_own_is_made_for_oneself(tmp_path, umask):
    before = os.umask(umask)
    try:
        made = own_folder(tmp_path / "a" / "cache", MEND)
    finally:
        os.umask(before)
    assert stat.S_IMODE(made.stat().st_mode) == 0o700


def test_rights_that_others_had_in_it_are_taken_away(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    assert stat.S_IMODE(own_folder(tmp_path / "cache", MEND).stat().st_mode) == 0o700


@root_alone
def test_a_folder_that_another_user_made_first_is_refused(open_to_all):
    as_stranger(lambda: (open_to_all / "cache").mkdir(mode=0o777))
    with pytest.raises(InputError, match=rf"cache: it belongs to another user \(number {STRANGER}\); choose another"):
        own_folder(open_to_all / "cache", MEND)


@root_alone
def test_a_link_that_another_user_laid_is_refused(open_to_all, tmp_path):
    (tmp_path / "mine").mkdir()
    as_stranger(lambda: (open_to_all / "cache").symlink_to(tmp_path / "mine"))
    with pytest.raises(InputError, match="cache: it is a link, and may lead anywhere; remove it, or choose another"):
        own_folder(open_to_all / "cache", MEND)


def test_a_place_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(InputError, match="cache: File exists; choose another"):
        own_folder(tmp_path / "cache", MEND)


@pytest.mark.parametrize(
    ("mode", "part"), [(0o700, ""), (0o755, ""), (0o775, "user-{}"), (0o777, "user-{}"), (0o1777, "user-{}")]
)
def test_of_a_folder_that_was_named_and_that_others_write_to_a_part_is_ones_own(tmp_path, mode, part):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(mode)
    found = own_part_of(tmp_path / "cache", MEND)
    assert found == tmp_path / "cache" / part.format(os.geteuid())
    assert stat.S_IMODE(found.stat().st_mode) & 0o022 == 0


def test_a_link_of_the_users_own_to_the_folder_that_was_named_is_followed(tmp_path):
    (tmp_path / "large").mkdir(mode=0o700)
    (tmp_path / "cache").symlink_to(tmp_path / "large")
    assert own_part_of(tmp_path / "cache", MEND) == tmp_path / "cache"


@root_alone
def test_a_part_that_another_user_made_first_is_refused(open_to_all):
    as_stranger(lambda: (open_to_all / "user-0").mkdir(mode=0o777))
    with pytest.raises(InputError, match="belongs to another user"):
        own_part_of(open_to_all, MEND)


def test_a_lock_follows_no_link_and_empties_nothing(tmp_path):
    precious = tmp_path / "precious"
    precious.write_bytes(b"kept")
    (tmp_path / "a.lock").symlink_to(precious)
    with pytest.raises(OSError, match="symbolic link"):
        open_lock(tmp_path / "a.lock")
    with open_lock(precious):
        pass
    assert precious.read_bytes() == b"kept"


def test_a_private_file_replaces_a_link_and_not_what_it_leads_to(tmp_path):
    precious = tmp_path / "precious"
    precious.write_bytes(b"kept")
    for name in ("a", "a.unfinished"):
        (tmp_path / name).symlink_to(precious)
    write_private(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert precious.read_bytes() == b"kept"
    assert stat.S_IMODE((tmp_path / "a").lstat().st_mode) == 0o600


class TestTheCachesPlace:
    @pytest.fixture(autouse=True)
    def _nothing_is_set(self, monkeypatch):
        for name in ("ZHLLAMA_CACHE", "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)

    def test_it_is_in_the_users_folder_for_caches(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert cache_folder() == tmp_path / "home" / ".cache" / "zhllama"
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert cache_folder() == tmp_path / "xdg" / "zhllama"
        monkeypatch.setenv("ZHLLAMA_CACHE", str(tmp_path / "named"))
        assert cache_folder() == tmp_path / "named"

    def test_a_home_that_cannot_be_written_is_one_line(self, tmp_path, monkeypatch):
        (tmp_path / "home").touch()
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        with pytest.raises(InputError, match="Not a directory; point ZHLLAMA_CACHE to a folder of your own"):
            cache_folder()


LEAVES = (
    "import sys, signal, os; from zhllama.stage.program import guarded; "
    "from zhllama.storage.private import temporary_folder\n"
    "def work():\n"
    "    with temporary_folder() as folder:\n"
    "        open(folder + '/a', 'w').close(); print(folder, flush=True)\n"
    "        if sys.argv[1] == 'fails': raise ValueError\n"
    "        if sys.argv[1] == 'waits': signal.pause()\n"
    "guarded(work)"
)


def leave(place: Path, how: str, number: int = 0) -> Path:
    """What a command had in TMPDIR, after its end."""
    command = [sys.executable, "-c", LEAVES, how]
    with subprocess.Popen(
        command, env={**os.environ, "TMPDIR": str(place)}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as one:
        assert one.stdout is not None
        had = Path(one.stdout.readline().strip())
        if number:
            one.send_signal(number)
    return had


@pytest.mark.parametrize(
    ("how", "number"), [("ends", 0), ("fails", 0), ("waits", signal.SIGTERM), ("waits", signal.SIGINT)]
)
def test_nothing_stays_in_the_temporary_folder(tmp_path, how, number):
    had = leave(tmp_path, how, number)
    assert had.parent == tmp_path
    assert os.listdir(tmp_path) == []


def test_what_a_killed_command_left_goes_at_the_next_start_and_what_is_in_use_stays(tmp_path, monkeypatch):
    had = leave(tmp_path, "waits", signal.SIGKILL)
    assert had.exists()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    others = tmp_path / f"{TEMPORARY}link"
    others.symlink_to(tmp_path / "elsewhere")
    old = time.time() - 3600
    with temporary_folder() as mine:
        # one that was just made may be without its lock
        assert had.exists()
        for path in (had, Path(mine)):
            os.utime(path, (old, old))
        with temporary_folder():
            assert not had.exists()
            assert Path(mine).exists()
    assert os.listdir(tmp_path) == [others.name]


@root_alone
def test_what_another_user_has_there_is_left_alone(open_to_all, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(open_to_all))
    others = open_to_all / f"{TEMPORARY}theirs"
    as_stranger(lambda: (others.mkdir(), os.utime(others, (0, 0)))[0])
    with temporary_folder():
        assert others.exists()


def test_a_probe_of_a_store_does_not_stay_in_it(tmp_path, monkeypatch):
    write = storage.write_bytes

    def interrupted(uri: str, content: bytes) -> None:
        write(uri, content)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            storage.check_writable(str(tmp_path))
    assert os.listdir(tmp_path) == []
    # of a command that was killed
    (tmp_path / ".probe").touch()
    storage.check_writable(str(tmp_path))
    assert os.listdir(tmp_path) == []
