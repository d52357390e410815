"""Volumes of pods, and claims for them."""

from collections.abc import Iterator, Mapping

from pipelines.manifests.check.documents import Finding
from pipelines.manifests.check.field import Field
from pipelines.manifests.check.server.containers import PULL_POLICIES, one_source
from zhllama.kubernetes import formats
from zhllama.kubernetes.formats import Check, between, each, given, mode, needed, one_of

_ITEMS: Mapping[str, Check] = {"defaultMode": mode}
_TYPES_OF_HOST_PATHS = (
    "", "DirectoryOrCreate", "Directory", "FileOrCreate", "File", "Socket", "CharDevice", "BlockDevice",
)  # fmt: skip
ACCESS_MODES = ("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod")


def volume(field: Field) -> Iterator[Finding]:
    yield from one_source(field, field.names() - {"name"}, "kind of volume", 0)


def projected(field: Field) -> Iterator[Finding]:
    """Files of several sources in one volume: no two of one path."""
    seen = set()
    for source in field.each("sources"):
        for kind in source.names() - {"serviceAccountToken"}:
            for item in (source[kind], *source[kind].each("items")):
                if item.text("path") and item.text("path") in seen:
                    yield item["path"].wrong(f"{item.text('path')!r} stands there already")
                seen.add(item.text("path"))


def pod_file(field: Field) -> Iterator[Finding]:
    """A file of the downward API."""
    yield from one_source(field, {"fieldRef", "resourceFieldRef"})
    path = field["fieldRef"].text("fieldPath")
    if path.startswith(("spec.", "status.")):
        yield field["fieldRef"]["fieldPath"].wrong(f"{path} cannot be read in a volume, only in a variable")
    reference = field["resourceFieldRef"]
    if reference and not reference.text("containerName"):
        yield reference["containerName"].wrong("is needed in a volume")


def projection(field: Field) -> Iterator[Finding]:
    yield from one_source(field, field.names(), "source", 0)


def claim_spec(field: Field) -> Iterator[Finding]:
    """Of a PersistentVolumeClaim, wherever it stands."""
    modes = field.list("accessModes")
    if "ReadWriteOncePod" in modes and len(modes) > 1:
        yield field["accessModes"].wrong("ReadWriteOncePod stands alone")
    storage = field["resources"].mapping("requests").get("storage")
    if storage is None:
        yield field["resources"]["requests"]["storage"].wrong("is needed")
    elif wrong := formats.positive_quantity(storage):
        yield field["resources"]["requests"]["storage"].wrong(f"{storage}: {wrong}")
    source = field["dataSource"]
    if source:
        for name in ("kind", "name"):
            if not source.text(name):
                yield source[name].wrong("is needed")
        if not source.text("apiGroup") and source.text("kind") not in ("", "PersistentVolumeClaim"):
            yield source["kind"].wrong("must be PersistentVolumeClaim without an apiGroup")


def host_path(field: Field) -> Iterator[Finding]:
    kind = field["type"].value
    if isinstance(kind, str) and kind not in _TYPES_OF_HOST_PATHS:
        yield field["type"].wrong(f"{kind!r} must be one of {', '.join(_TYPES_OF_HOST_PATHS[1:])}")


FIELDS: Mapping[str, Mapping[str, Check]] = {
    "Volume": {"name": needed(formats.dns_label)},
    "ConfigMapVolumeSource": {**_ITEMS, "name": needed()},
    "SecretVolumeSource": {**_ITEMS, "secretName": needed()},
    "DownwardAPIVolumeSource": _ITEMS,
    "ProjectedVolumeSource": _ITEMS,
    "ConfigMapProjection": {"name": needed()},
    "SecretProjection": {"name": needed()},
    "KeyToPath": {"key": needed(), "path": needed(formats.file_in_volume), "mode": mode},
    "DownwardAPIVolumeFile": {"path": needed(formats.file_in_volume), "mode": mode},
    "ServiceAccountTokenProjection": {
        "path": needed(formats.file_in_volume), "expirationSeconds": between(600, 2**32),
    },
    "PersistentVolumeClaimVolumeSource": {"claimName": needed()},
    "EmptyDirVolumeSource": {"sizeLimit": formats.no_negative_quantity},
    "HostPathVolumeSource": {"path": needed(formats.without_way_up)},
    "NFSVolumeSource": {"server": needed(), "path": needed(formats.absolute_path)},
    "GitRepoVolumeSource": {"repository": needed(), "directory": formats.relative_path},
    "CSIVolumeSource": {"driver": needed(lambda text: formats.subdomain(text.lower()))},
    "ISCSIVolumeSource": {"targetPortal": needed(), "iqn": needed(), "lun": between(0, 255)},
    "GlusterfsVolumeSource": {"endpoints": needed(), "path": needed()},
    "CephFSVolumeSource": {"monitors": needed()},
    "RBDVolumeSource": {"monitors": needed(), "image": needed()},
    "CinderVolumeSource": {"volumeID": needed()},
    "AWSElasticBlockStoreVolumeSource": {"volumeID": needed(), "partition": between(0, 255)},
    "GCEPersistentDiskVolumeSource": {"pdName": needed(), "partition": between(0, 255)},
    "AzureFileVolumeSource": {"secretName": needed(), "shareName": needed()},
    "AzureDiskVolumeSource": {"diskName": needed(), "diskURI": needed()},
    "VsphereVirtualDiskVolumeSource": {"volumePath": needed()},
    "FlexVolumeSource": {"driver": needed()},
    "ImageVolumeSource": {"pullPolicy": PULL_POLICIES},
    "EphemeralVolumeSource": {"volumeClaimTemplate": needed()},
    "PersistentVolumeClaimSpec": {
        "accessModes": needed(each(one_of(*ACCESS_MODES))),
        "volumeMode": given(one_of("Block", "Filesystem")),
        "storageClassName": formats.subdomain,
    },
}  # fmt: skip
RULES = {
    "Volume": [volume],
    "ProjectedVolumeSource": [projected],
    "DownwardAPIVolumeFile": [pod_file],
    "VolumeProjection": [projection],
    "HostPathVolumeSource": [host_path],
    "PersistentVolumeClaimSpec": [claim_spec],
}
