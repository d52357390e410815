"""Builds and runs the images without a registry: buildah and podman, on a base made of what this machine runs.

The base is this machine's Python, the libraries that it loads, a shell and a few tools, in some seconds;
ZHLLAMA_TEST_BASE names an image to take instead (python:3.11-slim, say, where a registry can be reached). buildah works
with chroot isolation, and both have a storage of their own: neither a daemon nor user namespaces are needed, only root.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

import pip

ROOT = Path(__file__).resolve().parents[2]
BASE = "localhost/zhllama-test-base"
TOOLS = ("sh", "grep", "id", "ls", "touch")
BESIDE_PYTHON = ("libstdc++.so.6", "libgcc_s.so.1", "libpthread.so.0", "libdl.so.2", "librt.so.1", "libutil.so.1")
"""What wheels take from the system, and python:3.11-slim has: C++'s library and glibc's own."""
CONFINED = (
    *("--read-only", "--read-only-tmpfs=false", "--tmpfs=/tmp", "--cap-drop=ALL"),
    *("--security-opt=no-new-privileges", "--ulimit=nofile=20000:20000", "--ulimit=nproc=4096:4096"),
)
"""A container as a restricted pod: nothing but /tmp can be written, no capability, no way to more."""


def missing() -> str:
    """Why images cannot be built here; "" where they can."""
    if os.geteuid() != 0:
        return "images are built as root here (chroot isolation), and this is another user"
    absent = [name for name in ("buildah", "podman", "runc", "ldd", "tar") if not shutil.which(name)]
    return f"{', '.join(absent)} not installed; on Debian: apt-get install buildah podman runc" if absent else ""


def libraries(file: Path) -> list[Path]:
    """The shared libraries that a program or a library loads, its loader among them."""
    said = subprocess.run(["ldd", str(file)], capture_output=True, text=True, check=False).stdout
    return [Path(path) for path in re.findall(r"(/\S+) \(0x", said)]


def write_base(folder: Path) -> None:
    """The root of a file system with this machine's Python below /usr/local."""
    prefix, local = Path(sys.base_prefix), folder / "usr" / "local"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for name in ("bin", "lib64", "etc/ssl/certs", "root", "proc", "sys", "dev", "run", "var/tmp", "usr/bin", "usr/lib"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "tmp").mkdir(mode=0o1777)
    (folder / "tmp").chmod(0o1777)
    (folder / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (folder / "etc" / "group").write_text("root:x:0:\n")

    left_out = shutil.ignore_patterns("test", "tests", "config-*", "site-packages", "idlelib", "tkinter")
    shutil.copytree(sysconfig.get_path("stdlib"), local / "lib" / version, ignore=left_out, symlinks=True)
    packages = local / "lib" / version / "site-packages"
    shutil.copytree(Path(pip.__file__).parent, packages / "pip", ignore=left_out)
    (local / "bin").mkdir()
    shutil.copy2(prefix / "bin" / version, local / "bin" / version)
    for name in ("python3", "python"):
        (local / "bin" / name).symlink_to(version)

    programs = [Path(found) for name in TOOLS if (found := shutil.which(name))]
    for program in programs:
        shutil.copy2(program.resolve(), folder / "bin" / program.name)
    cache = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=True).stdout
    beside = [Path(re.search(rf"{re.escape(name)} .*=> (\S+)", cache)[1]) for name in BESIDE_PYTHON]  # type: ignore[index]
    loading = [*programs, *beside, prefix / "bin" / version, *(local / "lib" / version / "lib-dynload").glob("*.so")]
    for library in {*beside, *(found for file in loading for found in libraries(file))}:
        system = library.is_relative_to("/lib") or library.is_relative_to("/lib64") or library.is_relative_to("/usr")
        place = folder / (str(library).lstrip("/") if system else f"usr/lib/{library.name}")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(library.resolve(), place)


def pip_settings(folder: Path) -> list[str]:
    """Options that show a build this machine's index and certificates, and leave nothing of them in the image."""
    said = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    found = dict(re.findall(r"^[\w:]+\.([\w-]+)='(.*)'$", said, re.MULTILINE))
    kept = ("index-url", "proxy", "trusted-host", "timeout")
    lines, volumes = ["[global]", *(f"{name} = {found[name]}" for name in kept if name in found)], []
    if "cert" in found:
        lines.append("cert = /etc/pip-certificates.pem")
        volumes.append(f"--volume={Path(found['cert']).resolve()}:/etc/pip-certificates.pem:ro")
    wheels = Path(found.get("find-links", "/nowhere"))
    if wheels.is_dir():
        lines.append(f"find-links = {wheels}")
        volumes.append(f"--volume={wheels}:{wheels}:ro")
    (folder / "pip.conf").write_text("\n".join(lines) + "\n")
    return [*volumes, f"--volume={folder / 'pip.conf'}:/etc/pip.conf:ro"]


class ContainerBuilder:
    """buildah and podman on a storage in `folder`, with the base loaded as BASE."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.storage = [f"--root={folder / 'storage'}", f"--runroot={folder / 'run'}"]
        self.pip = pip_settings(folder)
        # a storage inside a container's may not be overlaid; copies of whole layers always work
        for driver in ("overlay", "vfs"):
            self.environment = {**os.environ, "STORAGE_DRIVER": driver}
            if self._call("buildah", "from", "--name=try", "scratch").returncode == 0:
                break
        wanted = os.environ.get("ZHLLAMA_TEST_BASE")
        if wanted:
            self._must("podman", "pull", "--quiet", wanted)
            self._must("podman", "tag", wanted, BASE)
            return
        write_base(folder / "base")
        with subprocess.Popen(["tar", "-C", str(folder / "base"), "-c", "."], stdout=subprocess.PIPE) as tar:
            self._must("podman", "import", "--quiet", "-", BASE, stdin=tar.stdout)
        shutil.rmtree(folder / "base")

    def build(
        self, name: str, dockerfile: Path, context: Path = ROOT, **arguments: str
    ) -> "subprocess.CompletedProcess[str]":
        """Builds and names an image; the caller looks at the result."""
        options = ["--pull-never", "--isolation=chroot", "--layers", "--format=docker", *self.pip]
        options += [f"--build-arg={key}={value}" for key, value in arguments.items()]
        return self._call("buildah", "bud", *options, f"--tag={name}", f"--file={dockerfile}", str(context))

    def run(
        self, name: str, *command: str, user: str = "", entrypoint: str = "", volumes: Mapping[Path, str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """Runs a confined container to its end. `volumes`: folder here → folder in it, read-only."""
        options = [
            "--network=none",
            *CONFINED,
            *(f"--volume={here}:{there}:ro" for here, there in (volumes or {}).items()),
        ]
        options += [f"--user={user}"] if user else []
        options += [f"--entrypoint={entrypoint}"] if entrypoint else []
        return self._call("podman", f"--runtime={shutil.which('runc')}", "run", "--rm", *options, name, *command)

    def start(self, name: str, *command: str, volumes: Mapping[Path, str]) -> "subprocess.Popen[str]":
        """Starts a confined container that shares this machine's loopback; a signal to the process goes to it."""
        words = [
            "podman",
            *self.storage,
            f"--runtime={shutil.which('runc')}",
            "run",
            "--rm",
            "--network=host",
            *CONFINED,
        ]
        words += [f"--volume={here}:{there}:ro" for here, there in volumes.items()]
        return subprocess.Popen([*words, name, *command], env=self.environment, text=True, stderr=subprocess.PIPE)

    def inspect(self, name: str) -> str:
        """podman's JSON about an image."""
        return self._call("podman", "image", "inspect", name).stdout

    def close(self) -> None:
        """Removes all images and the storage."""
        self._call("buildah", "rm", "--all")
        self._call("podman", "rmi", "--all", "--force")
        subprocess.run(["umount", str(self.folder / "storage" / "overlay")], capture_output=True, check=False)
        shutil.rmtree(self.folder)

    def _call(self, program: str, *words: str, **more: object) -> "subprocess.CompletedProcess[str]":
        command: Sequence[str] = [program, *self.storage, *words]
        return subprocess.run(command, capture_output=True, text=True, env=self.environment, check=False, **more)  # type: ignore[call-overload, no-any-return]

    def _must(self, program: str, *words: str, **more: object) -> None:
        done = self._call(program, *words, **more)
        assert done.returncode == 0, f"{program} {words[0]}: {done.stderr}"
