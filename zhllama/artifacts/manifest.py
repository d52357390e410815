"""The manifest: a small JSON object, written last, that names an artifact's files and makes them visible.

It holds content alone (format 2): kind, files, vocabulary contract, configuration, the inputs' digests, and its own
digest over all of that: equal content, equal digest. Where, when and of what addresses it was made, what was measured,
and the reports (`beside`) are in `provenance.json` beside it. An artifact is read from where its manifest was found. A
*reference* is the address of a manifest (`…/manifest.json`), or a plain folder or prefix: with a manifest in it the two
are the same, without one the files are taken as they are. Format 1 had it all in one, and is read for ever.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from zhllama import storage
from zhllama.artifacts.json_file import object_of, value_of
from zhllama.errors import InputError
from zhllama.tokenizer.vocabulary import Vocabulary

log = logging.getLogger("artifact")

MANIFEST = "manifest.json"
PROVENANCE = "provenance.json"
FORMAT = 2
LAUNCHER = "launch_training"
"""The one stage whose manifest is the copy of another's, beside its own place in the same store."""

_PLACES = ("base_model_name_or_path", "revision")
_LOOKED_AT = 100
"""Files that are looked for beside a manifest, each a request, to tell an artifact from a copy of its manifest."""
_MEASURED = ("summary", "proof", "verified", "measured")
"""Facts that say what was measured, or by whose word: of provenance.json."""
_WRONG = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def placeless_digest(content: bytes) -> str:
    """SHA-256 of what an adapter_config.json says, but for where the base lies. ValueError where it is no object."""
    kept = {name: value for name, value in object_of(content).items() if name not in _PLACES}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class File:
    """A file of an artifact: its name below the root, bytes, SHA-256 (empty in a plain folder: unknown). `content`: of
    one that says where something lies, its placeless_digest, which alone is in the artifact's digest: who reads the
    file has that checked, too (BlockReader.block_digests)."""

    path: str
    size: int
    sha256: str
    content: str = ""

    def stated(self) -> dict[str, Any]:
        """As a manifest holds it."""
        return {name: value for name, value in vars(self).items() if name != "content" or value}


@dataclass(frozen=True)
class Input:
    """What a stage read: the reference it was given ("" where no provenance says) and the digest found behind it."""

    reference: str
    digest: str


@dataclass(frozen=True)
class Manifest:
    """What a stage published. `facts` are the stage's own statements, `metrics` its figures, `beside` the files outside
    the digest: reports, and the course of a training; `copies` the addresses in S3 of copies that `--output` made."""

    kind: str
    stage: str
    root: str
    files: tuple[File, ...]
    blocks: str | None = None
    vocabulary: Vocabulary | None = None
    configuration: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Input] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    created: str = ""
    host: str = ""
    digest: str = ""
    beside: tuple[File, ...] = ()
    copies: tuple[str, ...] = ()
    format: int = FORMAT

    @property
    def reference(self) -> str:
        return f"{self.root}/{MANIFEST}"

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.named)

    @property
    def named(self) -> tuple[File, ...]:
        """All files, those beside the content too."""
        return (*self.files, *self.beside)

    @property
    def _moved(self) -> list[str]:
        """The options that say where something lies: by their text, or since an input has their name."""
        return [name for name, one in self.configuration.items() if self._says_place(name, one)]

    def _says_place(self, option: str, value: Any) -> bool:
        return _is_address(value) or (isinstance(value, str) and option in self.inputs)

    def _content(self) -> dict[str, Any]:
        """What the digest is of, but for files that say where something lies."""
        value = asdict(replace(self, files=(), beside=()))
        # asdict copies what it finds, one by one: a tenth of a second for 10,000 files, several times
        value["files"] = [file.stated() for file in self.files]
        for left_out in ("root", "created", "host", "digest", "beside", "copies"):
            del value[left_out]
        if self.format == 1:
            del value["format"]
            return value | {"inputs": {name: given.digest for name, given in self.inputs.items()}}
        del value["metrics"]
        value["inputs"] = {name: {"digest": given.digest} for name, given in self.inputs.items()}
        value["configuration"] = {name: one for name, one in value["configuration"].items() if name not in self._moved}
        value["facts"] = {name: one for name, one in self.facts.items() if name not in _MEASURED}
        return value

    def computed_digest(self) -> str:
        value = self._content()
        for file in value["files"]:
            if "content" in file:
                del file["size"], file["sha256"]
        return digest_of(value)

    def to_json(self, root: str = "") -> bytes:
        """root: of a copy at another place, which says where the artifact lies."""
        value: dict[str, Any] = {"format": self.format, **self._content(), "digest": self.digest}
        if self.format == 1:
            value |= {"root": self.root, "created": self.created, "host": self.host}
            value["inputs"] = {name: vars(given) for name, given in self.inputs.items()}
        return _text(value | ({"root": root} if root else {}))

    def provenance_json(self) -> bytes:
        """What lies in provenance.json."""
        return _text(
            {
                "digest": self.digest,
                "created": self.created,
                "host": self.host,
                "inputs": {name: given.reference for name, given in self.inputs.items()},
                "configuration": {name: self.configuration[name] for name in self._moved},
                "facts": {name: one for name, one in self.facts.items() if name in _MEASURED},
                "metrics": self.metrics,
                "files": [file.stated() for file in self.beside],
                "copies": self.copies,
            }
        )

    def publish(self, if_absent: bool = False) -> None:
        """Writes provenance and, last, manifest below the root. FileExistsError: `if_absent`, and a manifest is."""
        where, provenance = f"{self.root}/{PROVENANCE}", self.provenance_json()
        if self.format > 1:
            if if_absent and storage.exists(self.reference):
                raise FileExistsError(self.reference)
            storage.write_bytes(where, provenance)
        storage.write_bytes(self.reference, self.to_json(), if_absent=if_absent)
        # another run that came second to the manifest may have been second to its provenance, too
        if self.format > 1 and if_absent and storage.read_or_none(where) != provenance:
            storage.write_bytes(where, provenance)

    def write_copy(self, uri: str) -> None:
        """The copy at `--output`. Of one in S3, where others may write, the artifact says that it is its own."""
        if self.format > 1 and storage.is_s3(uri) and uri not in self.copies:
            known = replace(self, copies=(*self.copies, uri))
            storage.write_bytes(f"{self.root}/{PROVENANCE}", known.provenance_json())
        storage.write_bytes(uri, self.to_json(self.root))

    @staticmethod
    def from_json(content: bytes, where: str, root: str | None = None) -> "Manifest":
        """Parses and checks a manifest; InputError when it is not one or does not match its own digest. root: where it
        was found; None: what it says itself, "" where it says nothing."""
        try:
            value = value_of(content)
            version = value["format"]
            if version not in (1, FORMAT):
                raise InputError(f"{where}: manifest format {version}; this program reads formats 1 and {FORMAT}")
            value["root"] = value.get("root", "") if root is None else root
            value["files"] = _files(value["files"])
            value["inputs"] = {name: Input(**{"reference": "", **given}) for name, given in value["inputs"].items()}
            if value["vocabulary"] is not None:
                value["vocabulary"] = Vocabulary(**value["vocabulary"])
            manifest = Manifest(**value)
            for one in filter(None, (manifest, manifest.vocabulary, *manifest.inputs.values())):
                _require_types(one)
            if manifest.vocabulary is not None and manifest.vocabulary.padding_multiple < 1:
                raise ValueError("its rows are padded to nothing")
            if manifest.blocks is not None and manifest.blocks not in {file.path for file in manifest.files}:
                raise ValueError(f"its block digests {manifest.blocks!r} are none of its files")
            wrong = manifest.digest != manifest.computed_digest()
        except _WRONG as error:
            raise InputError(f"{where}: not a zhllama manifest ({error}); give the reference a stage wrote") from error
        if wrong:
            raise InputError(f"{where}: the manifest was changed after it was written; run its stage again")
        return manifest

    def told(self, content: bytes | None) -> "Manifest":
        """With what provenance.json says, of what the digest leaves out alone; InputError where that is damaged, or
        another artifact's."""
        if content is None or self.format == 1:
            return self
        own = {MANIFEST, PROVENANCE, *(file.path for file in self.files)}
        try:
            said = value_of(content)
            if said["digest"] != self.digest:
                raise ValueError("it is of another artifact")
            return replace(
                self,
                created=str(said["created"]),
                host=str(said["host"]),
                inputs={
                    name: replace(given, reference=str(said["inputs"].get(name, "")))
                    for name, given in self.inputs.items()
                },
                configuration={
                    **{name: one for name, one in said["configuration"].items() if self._says_place(name, one)},
                    **self.configuration,
                },
                facts={**{name: said["facts"][name] for name in _MEASURED if name in said["facts"]}, **self.facts},
                metrics={name: float(figure) for name, figure in said["metrics"].items()},
                beside=tuple(file for file in _files(said["files"]) if file.path not in own),
                copies=tuple(map(str, said.get("copies", ()))),
            )
        except _WRONG as error:
            wrong = f"{self.root}/{PROVENANCE}: damaged ({error})"
            raise InputError(f"{wrong}; remove it, or run the stage again") from error


def read_manifest(uri: str, where: str = "") -> Manifest | None:
    """The manifest at an address, with its provenance; None where none is. Its root is where it was found, whatever it
    says itself. One exception: the copy that a stage left at `--output`, which lies without its files, leads to the
    original, and so does a launcher's to the training's in its store."""
    content = storage.read_or_none(uri)
    if content is None:
        return None
    here, where = uri.removesuffix(f"/{MANIFEST}"), where or uri
    stated = Manifest.from_json(content, where)
    if stated.root not in ("", here) and not any(
        storage.exists(f"{here}/{file.path}") for file in stated.named[:_LOOKED_AT]
    ):
        return _original(stated, uri, where)
    return with_provenance(replace(stated, root=here))


def _original(copy: Manifest, uri: str, where: str) -> Manifest:
    """What a copy leads to, if the same artifact is there. In S3 anybody may have written the copy, so as to have read
    what he cannot read himself: there the original has to name it, or be of format 1, which names none."""
    root, trusted = copy.root, not storage.is_s3(uri)
    if uri.split("/")[-3:-2] == [LAUNCHER]:
        # by its place in the store, which may be a copy of the one that it was written in
        root, trusted = storage.join(uri.rsplit("/", 3)[0], "/".join(root.split("/")[-2:])), True
    content = None
    if trusted or copy.format > 1 or storage.is_s3(root):
        content = storage.read_or_none(f"{storage.normalise(root)}/{MANIFEST}")
    if content is not None:
        found = with_provenance(Manifest.from_json(content, f"{root}/{MANIFEST}", root))
        if found.digest == copy.digest and (trusted or found.format == 1 or uri in found.copies):
            return found
    raise InputError(f"{where}: none of its files is here, and {copy.root} is not read for it; give the artifact")


def with_provenance(manifest: Manifest) -> Manifest:
    """With its provenance. What is damaged beside an artifact does not make the artifact unreadable."""
    try:
        return manifest.told(storage.read_or_none(f"{manifest.root}/{PROVENANCE}"))
    except InputError as error:
        log.warning("%s", error)
        return manifest


def _require_types(one: Any) -> None:
    """ValueError where a field of a dataclass has not the type that it says: others write manifests, too."""
    for name, hint in get_type_hints(type(one)).items():
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        value = getattr(one, name)
        if not isinstance(value, tuple(get_origin(kind) or kind for kind in kinds)):
            raise ValueError(f"its {name} is {value!r:.80}")


def _files(listed: Any) -> tuple[File, ...]:
    """ValueError for a file that is none, and for a name that leads out of the artifact."""
    files = tuple(File(**file) for file in listed)
    for file in files:
        kinds = all(isinstance(one, str) for one in (file.path, file.sha256, file.content)) and type(file.size) is int
        if not kinds or file.size < 0:
            raise ValueError(f"{file} is no file")
        try:
            storage.join("", file.path)
        except InputError as error:
            raise ValueError(f"the file name {file.path!r} leads out of its folder") from error
    return files


def _is_address(value: Any) -> bool:
    """Whether an option's value says where something lies, and not what it is."""
    if isinstance(value, list):
        return any(map(_is_address, value))
    return isinstance(value, str) and ("://" in value or value.startswith(("/", "~", "./", "../")))


def _text(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
