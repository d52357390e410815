"""A pod's secret volumes as the kubelet makes them: the files of a version in a folder of its own, and links to them
through `..data`, which it replaces in one step when the secret changes."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class NotMounted(Exception):
    """The Event FailedMount, in the kubelet's words."""


def mount(folder: Path, pod: Mapping[str, Any], path: str, secrets: Mapping[str, Mapping[str, str]]) -> None:
    """Makes, or makes anew, in `folder` what the pod's first container finds at `path`."""
    (name,) = [one["name"] for one in pod["containers"][0]["volumeMounts"] if one["mountPath"] == path]
    (volume,) = [one["projected"] for one in pod["volumes"] if one["name"] == name]
    files: dict[str, str] = {}
    for source in (one["secret"] for one in volume["sources"]):
        optional, secret = source.get("optional", False), secrets.get(source["name"])
        if secret is None and not optional:
            raise NotMounted(f'MountVolume.SetUp failed for volume "{name}" : secret "{source["name"]}" not found')
        for item in source["items"]:
            if item["key"] in (secret or {}):
                files[item["path"]] = (secret or {})[item["key"]]
            elif not optional:
                said = f"references non-existent secret key: {item['key']}"
                raise NotMounted(f'MountVolume.SetUp failed for volume "{name}" : {said}')
    write(folder, files, volume["defaultMode"])


def write(folder: Path, files: Mapping[str, str], mode: int = 0o644) -> None:
    folder.mkdir(exist_ok=True)
    old = folder / os.readlink(folder / "..data") if (folder / "..data").is_symlink() else None
    version = folder / f"..{len(list(folder.iterdir()))}{'a' if old is None else old.name[2:]}"
    version.mkdir()
    for name, text in files.items():
        (version / name).write_text(text)
        (version / name).chmod(mode)
    (folder / "..data_tmp").symlink_to(version.name)
    (folder / "..data_tmp").rename(folder / "..data")
    for name in files:
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")
    for path in folder.iterdir():
        if path.is_symlink() and not path.exists():
            path.unlink()
    if old is not None:
        for path in old.iterdir():
            path.unlink()
        old.rmdir()
