"""For what the stages published: `zhllama ls`, `show`, `verify`, `gc` and `cp`, in S3 and in folders alike. This
machine's own S3 server is started, where the address is in its bucket, for as long as it takes."""

import argparse
import json
import sys
from contextlib import AbstractContextManager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import inventory
from pipelines.cli import options
from zhllama import storage
from zhllama.artifacts.lineage import Ancestor, lineage, manifest_of
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.published import copy_artifact
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.progress import human
from zhllama.stage.durations import read_duration
from zhllama.terminal import say

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.tree import Tree


def add_to(commands: options.Commands) -> None:
    add = options.command(commands, "show", show, "an artifact: its manifest, and what it came from, up to the weights")
    options.take(
        add,
        ("reference REF", "the reference that a stage wrote, or the folder of its manifest"),
        ("--sample N", "of a packed dataset: this many blocks, as text", 0),
        ("--split", "that --sample looks into", ("train", "validation")),
        options.JSON,
        options.WORK,
    )
    store = ("store STORE", "a folder or s3:// prefix (default: of zhllama run here)", "")
    options.take(
        options.command(commands, "ls", list_, "the artifacts of a store, oldest first"),
        store,
        ("--kind", "only these: hf-model, adapter, packed-dataset, tokenizer, …"),
        ("--stage", "only what this stage made"),
        options.JSON,
        options.WORK,
    )
    add = options.command(commands, "verify", verify, "read every block of an artifact against its digests")
    options.take(add, ("reference REF", None), options.WORK)
    options.take(
        options.command(commands, "gc", gc, "delete unreferenced data: aborted stages, incomplete uploads"),
        store,
        ("--dry-run", "only say what it would delete", False),
        ("--older-than AGE", "what was written to since is left: 12h, 7d (default), 2w", "7d"),
        options.JSON,
        options.WORK,
    )
    options.take(
        options.command(commands, "cp", copy, "copy an artifact: server-side within S3, verified, its manifest last"),
        ("reference REF", None),
        ("target TARGET", "the s3:// prefix, or the folder, that will hold its files"),
        options.WORK,
    )


def _reaching(
    given: argparse.Namespace, address: str, folder: bool = False, attach: bool = True
) -> AbstractContextManager[str]:
    """`folder`: a prefix of S3 may be empty, but a folder that is not there is a slip of the pen. attach: while a run
    goes on, too."""
    from pipelines.local.runner import s3_for

    if folder and address and not storage.is_s3(address) and not Path(storage.normalise(address)).is_dir():
        raise InputError(f"{address}: no such folder; give a store: a folder, or an s3:// prefix")
    if not address and not (given.work / "s3").is_dir():
        raise InputError(f"--work {given.work}: no run has been here; name a store, as s3://bucket/store")
    return s3_for(given.work.absolute(), address, attach)


def show(given: argparse.Namespace) -> None:
    if given.sample < 0:
        raise InputError(f"--sample {given.sample}: give how many blocks to show")
    with _reaching(given, given.reference):
        if given.sample:
            from zhllama.artifacts.open import open_artifact
            from zhllama.data import packed_view

            view: Any = packed_view.as_json if given.json else packed_view.view
            found = view(open_artifact(given.reference, "show"), given.sample, given.split)
        else:
            manifest = manifest_of(given.reference)
            ancestor = lineage(manifest)
            parts = {"reference": manifest.reference, "manifest": manifest, "lineage": ancestor}
            found = parts if given.json else shown(manifest, ancestor)
    if given.json:
        say(json.dumps(found, indent=1, ensure_ascii=False, default=asdict))
    else:
        options.console().print(found)


def list_(given: argparse.Namespace) -> None:
    from rich.text import Text

    with _reaching(given, given.store, folder=True) as store:
        found, damaged = inventory.published(store)
    # a training has many checkpoints, and looks after them itself
    kinds = {given.kind} if given.kind else {one.kind for one in found} - {"checkpoint"}
    chosen = [one for one in found if one.kind in kinds and given.stage in ("", one.stage)]
    console = options.console()
    if given.json:
        say(json.dumps([inventory.as_json(one) for one in chosen], indent=1, ensure_ascii=False))
    elif not chosen:
        say(f"{store}: no artifact is here")
    else:
        for one in chosen:
            line = Text().append(f"{one.created[:16].replace('T', ' ')}  ", "dim")
            line.append(f"{one.kind:<14}", "bold")
            line.append(f"  {human(one.size, 'B'):>9}  {one.facts.get('summary') or one.stage}")
            # a terminal's line is short, and a reference has to be copied whole
            line.append("\n    " if console.is_terminal else "  ").append(one.reference, "cyan")
            console.print(line, soft_wrap=True)
    for wrong in damaged:
        say(f"warning: {wrong}", sys.stderr)


def verify(given: argparse.Namespace) -> None:
    with _reaching(given, given.reference):
        manifest = manifest_of(given.reference)
        damages = Artifact(manifest, verified=True).find_corruption()
    if damages:
        say("\n".join(damages))
        raise InputError(f"{given.reference}: {len(damages)} blocks are not as the manifest says; run its stage again")
    say(f"{_size_of(manifest)}, every block is as the manifest says")


def gc(given: argparse.Namespace) -> None:
    from rich.table import Table

    older_than, now = read_duration(given.older_than, "--older-than"), datetime.now(UTC)
    # what a run is about to publish is named by nothing yet
    with _reaching(given, given.store, folder=True, attach=given.dry_run) as store:
        found, damaged = inventory.unreferenced(store, older_than, now)
        freed = sum(one.bytes for one in found) if given.dry_run else inventory.free(found)
    if given.json:
        value = {"dry_run": given.dry_run, "bytes": freed, "unreferenced": [one.as_json() for one in found]}
        say(json.dumps(value, indent=1))
    elif not found:
        say(f"{store}: nothing to free that is older than {given.older_than}")
    else:
        table = Table("age", "size", "what", "where", box=None, padding=(0, 2, 0, 0), header_style="dim")
        table.columns[0].justify = table.columns[1].justify = "right"
        table.columns[3].overflow = "fold"
        for one in found:
            table.add_row(inventory.shown_age(now - one.modified), human(one.bytes, "B"), one.what, one.where)
        options.console().print(table)
        places = "1 place" if len(found) == 1 else f"{len(found)} places"
        print(f"{'would free' if given.dry_run else 'freed'} {human(freed, 'B')} in {places}")
    for wrong in damaged:
        say(f"warning: {wrong}", sys.stderr)


def copy(given: argparse.Namespace) -> None:
    with _reaching(given, given.reference), _reaching(given, given.target):
        artifact = Artifact(manifest_of(given.reference), verified=True)
        try:
            copied = copy_artifact(artifact, given.target)
        except FileExistsError as error:
            raise InputError(f"{given.target}: another artifact is there; choose another place") from error
    say(_size_of(copied))


def _size_of(manifest: Manifest) -> str:
    return f"{manifest.reference}: {len(manifest.files)} files, {human(manifest.size, 'B')}"


def shown(manifest: Manifest, ancestor: Ancestor) -> "RenderableType":
    """An artifact as a person reads it: what it is, its files, how it was made, what it came from."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    def pairs(title: str, values: Any) -> list["RenderableType"]:
        if not values:
            return []
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 2), pad_edge=True)
        for name, value in values.items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            table.add_row(Text(str(name), "dim"), Text(text, overflow="fold"))
        return [Text(f"\n{title}", "bold"), table]

    facts = dict(manifest.facts)
    about: dict[str, Any] = {"kind": manifest.kind, "stage": manifest.stage, "where": manifest.root}
    about |= {"digest": manifest.digest, "made": f"{manifest.created} on {manifest.host}"}
    if "summary" in facts:
        about["summary"] = facts.pop("summary")
    if found := manifest.vocabulary:
        about["vocabulary"] = f"{found}, bos {found.bos}, eos {found.eos}, pad {found.pad}, {found.rows} rows"
    files = Table(box=None, padding=(0, 2, 0, 2), header_style="dim")
    files.add_column("file", overflow="fold")
    files.add_column("size", justify="right", no_wrap=True)
    files.add_column("SHA-256", no_wrap=True)
    for file in manifest.files:
        files.add_row(file.path, human(file.size, "B"), file.sha256[:16])
    return Group(
        *pairs(manifest.reference, about),
        Text(f"\nfiles: {len(manifest.files)}, {human(manifest.size, 'B')}", "bold"),
        files,
        *pairs("configuration", manifest.configuration),
        # what was measured is no truer with sixteen digits
        *pairs("facts", json.loads(json.dumps(facts), parse_float=lambda text: float(f"{float(text):.6g}"))),
        *pairs("metrics", {name: f"{value:.6g}" for name, value in manifest.metrics.items()}),
        Text("\nlineage", "bold"),
        _tree(ancestor),
    )


def _tree(ancestor: Ancestor) -> "Tree":
    from rich.text import Text
    from rich.tree import Tree

    expanded: set[str] = set()

    def add(node: Ancestor, parent: Tree) -> Tree:
        seen = bool(node.inputs) and node.digest in expanded
        expanded.add(node.digest)
        text = Text(overflow="fold")
        text.append(f"{node.name}: " if node.name else "", "dim").append(node.kind or "input", "bold")
        text.append(f" by {node.stage}" if node.stage else "").append(f"  {node.digest[:12]}", "cyan")
        text.append(f"  {node.summary}" if node.summary and not seen else "")
        text.append(f"  {node.state}" if node.state else "", "bold red")
        branch = parent.add(text.append("  (as above)" if seen else f"\n{node.reference}", "dim"), guide_style="dim")
        for given in () if seen else node.inputs:
            add(given, branch)
        return branch

    return add(ancestor, Tree(""))
