"""The images, built and run: by their lists alone, and as a restricted pod runs them.

Each stage's image is built here as it is for a cluster, and run without root or capabilities, on a read-only root. So
that CI can afford it, only the control image's packages are installed for it; the other stages' images stand on the
same base and are lent this machine's packages, which are those of the lists (test_lock.py). `make images-test` builds
every base in full.
"""

import json
import os
import re
import signal
import socket
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.images.container_builder import BASE, ContainerBuilder, missing
from tests.images.pin_lists import parse

ROOT = Path(__file__).resolve().parents[2]
STAGES = sorted(path.parent.name for path in (ROOT / "images").glob("*/Dockerfile") if path.parent.name != "base")
FULL = os.environ.get("ZHLLAMA_TEST_IMAGES") == "full"
PACKAGES = Path(sysconfig.get_path("purelib"))
"""This machine's installed packages."""
# one storage, filled once
pytestmark = [pytest.mark.xdist_group("images"), pytest.mark.images]


@pytest.fixture(scope="module")
def builder() -> Iterator[ContainerBuilder]:
    if reason := missing():
        pytest.skip(f"IMAGES ARE NOT BUILT HERE: {reason}")
    # not below pytest's folder: podman takes no runroot of more than 50 characters
    made = ContainerBuilder(Path(tempfile.mkdtemp(prefix="images-")))
    yield made
    made.close()


@pytest.fixture(scope="module")
def base(builder: ContainerBuilder) -> Callable[[str], str]:
    """The base of an extra: extra → its image, built at the first call."""
    built: dict[str, str] = {}

    def of(extra: str) -> str:
        if extra not in built:
            if extra == "gguf" and builder.run(BASE, "-c", "command -v apt-get", entrypoint="sh").returncode != 0:
                pytest.skip("THE GGUF IMAGE IS NOT BUILT: its compiler wants a base with apt-get (ZHLLAMA_TEST_BASE)")
            name = f"localhost/zhllama-base-{extra}"
            torch = {
                "TORCH_SPEC": os.environ.get("TORCH_SPEC", "torch==2.13.0"),
                "TORCH_INDEX_ARGS": os.environ.get("TORCH_INDEX_ARGS", ""),
            }
            more = torch if extra in ("train", "serve", "gguf") else {}
            done = builder.build(name, ROOT / "images/base/Dockerfile", EXTRA=extra, BASE_IMAGE=BASE, **more)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            built[extra] = name
        return built[extra]

    return of


@pytest.fixture(scope="module")
def image(builder: ContainerBuilder, base: Callable[[str], str]) -> Callable[[str], str]:
    """The image of a stage: stage → its name, built at the first call."""
    built: dict[str, str] = {}

    def of(stage: str) -> str:
        if stage not in built:
            dockerfile = ROOT / "images" / stage / "Dockerfile"
            extra = re.search(r"BASE=zhllama-base-(\w+)", dockerfile.read_text())[1]  # type: ignore[index]
            name = f"localhost/zhllama-{stage.replace('_', '-')}"
            arguments = {"BASE": base(extra if FULL else "control"), "VERSION": "1.2.3", "REVISION": "c0ffee"}
            done = builder.build(name, dockerfile, **arguments)
            assert done.returncode == 0, done.stderr[-3000:]
            built[stage] = name
        return built[stage]

    return of


def packages(stage: str) -> dict[Path, str]:
    """What a stage's container must be lent, because its base was not built in full."""
    if FULL or stage == "launch_training":
        return {}
    return {PACKAGES: f"/opt/zhllama/lib/{PACKAGES.parent.name}/site-packages"}


# --- what is in an image ----------------------------------------------------------------------------------------------


def test_an_image_holds_its_list_and_nothing_more(builder, base):
    program = (
        "import json, sys\n"
        "from importlib.metadata import distributions\n"
        "print(json.dumps([d.name + '==' + d.version for d in distributions(path=[sys.argv[1]])]))\n"
    )
    where = f"/opt/zhllama/lib/{PACKAGES.parent.name}/site-packages"
    done = builder.run(base("control"), "-c", program, where, entrypoint="python")
    assert done.returncode == 0, done.stderr
    held = {f"{re.sub('[-_.]+', '-', name).lower()}=={version}" for name, _, version in split(json.loads(done.stdout))}
    listed = parse((ROOT / "images" / "requirements" / "control.txt").read_text())
    assert held == {f"{name}=={version}" for name, (version, _) in listed.items()}


def split(pins: list[str]) -> Iterator[tuple[str, str, str]]:
    yield from (pin.partition("==") for pin in pins)


def test_an_image_is_labelled_and_runs_its_stage_as_anybody_but_root(builder, image):
    (said,) = json.loads(builder.inspect(image("launch_training")))
    settings = said["Config"]
    assert settings["Entrypoint"] == ["python", "-m", "components.launch_training"]
    assert settings["User"] == "65532:0"
    assert settings["Labels"]["org.opencontainers.image.title"] == "zhllama-launch-training"
    assert settings["Labels"]["org.opencontainers.image.version"] == "1.2.3"
    assert settings["Labels"]["org.opencontainers.image.revision"] == "c0ffee"


def with_list(folder: Path, text: str) -> Path:
    """A build context whose list `trial` is this."""
    place = folder / "images" / "requirements" / "trial.txt"
    place.parent.mkdir(parents=True)
    place.write_text(text)
    return folder


def entry(name: str) -> str:
    pins = parse((ROOT / "images" / "requirements" / "control.txt").read_text())
    version, hashes = pins[name]
    return " ".join([f"{name}=={version}", *(f"--hash=sha256:{sha256}" for sha256 in hashes)])


def test_a_file_with_another_hash_is_not_installed(builder, tmp_path):
    forged = re.sub(r"sha256:..", "sha256:00", entry("tenacity"))
    context = with_list(tmp_path, forged + "\n")
    done = builder.build("trial", ROOT / "images/base/Dockerfile", context, EXTRA="trial", BASE_IMAGE=BASE)
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stdout + done.stderr


def test_a_list_without_something_that_is_needed_makes_no_image(builder, tmp_path):
    context = with_list(tmp_path, entry("markdown-it-py") + "\n")
    done = builder.build("trial", ROOT / "images/base/Dockerfile", context, EXTRA="trial", BASE_IMAGE=BASE)
    assert done.returncode != 0
    assert "mdurl" in done.stdout + done.stderr


# --- as a restricted pod ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_helps_without_root_on_a_read_only_root(builder, image, stage):
    done = builder.run(image(stage), "--help", volumes=packages(stage))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: python -m components.{stage}")


def test_such_a_container_can_write_below_tmp_alone(builder, image):
    script = "id -u; touch /tmp/x && echo wrote; touch /app/x"
    done = builder.run(image("launch_training"), "-c", script, entrypoint="sh")
    assert done.stdout.split() == ["65532", "wrote"]
    assert "Read-only file system" in done.stderr


def test_a_stage_works_under_any_uid(builder, image, tmp_path, chinese_text):
    """As OpenShift does it: a uid that no image knows, in group 0."""
    (tmp_path / "text.txt").write_text("\n".join(chinese_text[:3000]))
    readable(tmp_path)
    options = ["--text", "/text", "--vocab-size", "2000", "--store", "/tmp/store"]
    lent = {**packages("train_tokenizer"), tmp_path: "/text"}
    done = builder.run(image("train_tokenizer"), *options, user="1000650000:0", volumes=lent)
    assert done.returncode == 0, done.stderr
    assert "2,000 pieces" in done.stderr


def test_a_stage_with_torch_works_on_a_read_only_root(builder, image, tmp_path, tiny_meta):
    weights = tmp_path / "weights"
    weights.mkdir()
    for file in tiny_meta.iterdir():
        (weights / file.name).write_bytes(file.read_bytes())
    readable(tmp_path)
    lent = {**packages("convert_weights"), weights: "/weights"}
    done = builder.run(image("convert_weights"), "--weights", "/weights", "--store", "/tmp/store", volumes=lent)
    assert done.returncode == 0, done.stderr
    assert "convert_weights: done" in done.stderr


def test_wrong_input_ends_with_2_and_one_line(builder, image):
    options = ["--text", "/nowhere", "--vocab-size", "2000", "--store", "/tmp/store"]
    done = builder.run(image("train_tokenizer"), *options, volumes=packages("train_tokenizer"))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_signal_reaches_the_stage_in_its_container(builder, image):
    """A source takes the connection and says nothing; then the pod is told to end."""
    with socket.create_server(("127.0.0.1", 0)) as source:
        source.settimeout(300)
        address = f"http://127.0.0.1:{source.getsockname()[1]}/weights"
        options = ["--source", address, "--size", "7b", "--store", "/tmp/store"]
        stage = builder.start(image("fetch_weights"), *options, volumes=packages("fetch_weights"))
        try:
            connection, _ = source.accept()
            with connection:
                stage.send_signal(signal.SIGTERM)
                _, said = stage.communicate(timeout=120)
        finally:
            stage.kill()
    assert stage.returncode == 143, said


def readable(folder: Path) -> None:
    """For every uid, as a volume of a cluster would be."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
