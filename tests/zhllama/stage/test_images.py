"""Images by tag or by digest, and the lists of digests that builds write."""

import json

import pytest

from zhllama.errors import InputError
from zhllama.stage import images

ONE, OTHER = "sha256:" + "1" * 64, "sha256:" + "2" * 64
BAKED = {
    "serve": {"image.name": "r.example.com/team/zhllama-serve:1.2", "containerimage.digest": ONE},
    "fetch-weights": {
        "image.name": "r.example.com:5000/team/zhllama-fetch-weights:1.2,other.example.com/zhllama-fetch-weights",
        "containerimage.digest": OTHER,
    },
    "base-data": {"containerimage.digest": ONE},
    "buildx.build.warnings": [],
}
LINES = f"r.example.com/team/zhllama-serve {ONE}\n\nzhllama-fetch-weights:1.2   {OTHER}\n"


@pytest.fixture(autouse=True)
def _nothing_is_set(monkeypatch):
    for name in (images.REGISTRY, images.TAG, images.DIGESTS):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("text", [json.dumps(BAKED), LINES], ids=["bake's metadata", "lines"])
def test_a_list_of_digests_pins_the_images(tmp_path, monkeypatch, text):
    (tmp_path / "digests").write_text(text)
    monkeypatch.setenv(images.DIGESTS, images.read_digests(tmp_path / "digests"))
    monkeypatch.setenv(images.REGISTRY, "r.example.com/team")
    assert images.image("fetch_weights") == f"r.example.com/team/zhllama-fetch-weights:{images.VERSION}@{OTHER}"
    assert images.image("serve").endswith(f"@{ONE}")
    assert set(images.settings()) == {images.REGISTRY, images.DIGESTS}
    with pytest.raises(InputError, match="no digest of zhllama-pretrain; list every image"):
        images.image("pretrain")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nginx sha256:" + "1" * 64, "'nginx sha256:1+' is not an image of ours and its digest"),
        ("zhllama-serve sha256:123", "'zhllama-serve sha256:123' is not an image of ours"),
        ('{"serve": {"image.name": "zhllama-serve:1"}}', "containerimage.digest"),
        ("{", "--digests .*digests: .*; give what bake --metadata-file wrote"),
    ],
)
def test_another_list_is_refused(tmp_path, text, message):
    (tmp_path / "digests").write_text(text)
    with pytest.raises(InputError, match=message):
        images.read_digests(tmp_path / "digests")


def test_an_absent_list_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"--digests .*none: it cannot be read"):
        images.read_digests(tmp_path / "none")


def test_registries_and_tags_are_what_an_image_can_be_pulled_from():
    for registry in (
        "",
        "localhost:5000",
        "r.example.com/team",
        "R.example.com:443/a-b/c_d/e.f/",
        "team",
        "localhost/x",
    ):
        images.check_place(registry, "1.2.3-rc_1")
    for registry in (
        "Reg/x",
        "r.example.com/Team",
        "-r.example.com",
        "r..example.com/x",
        "r.example.com:x",
        "a//b",
        ".",
    ):
        with pytest.raises(InputError, match=r"--registry: .* is no registry; write a host and a path in lower case"):
            images.check_place(registry, "")


@pytest.mark.parametrize(("name", "value"), [
    (images.REGISTRY, "Reg/x"), (images.TAG, "a b"), (images.DIGESTS, "digests.txt"),
    (images.DIGESTS, f"serve={ONE},x"),
])  # fmt: skip
def test_a_variable_that_holds_no_such_thing_is_named(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"^{name}\\b"):
        images.image("serve")
