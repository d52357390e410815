"""The name of a stage's work: the digest of all that decides its result.

That is the stage, the `cache_version` of its options class (raised by hand; tests/test_cache_versions.py reminds who
changes what a stage computes), the versions of the libraries and the options that count, and the digests of the inputs.
Not the code: a comment would train a 7B anew.
"""

import importlib.metadata
from collections.abc import Mapping, Sequence

from zhllama.artifacts.manifest import Input, digest_of
from zhllama.errors import InputError
from zhllama.stage.options import StageOptions, configuration_of


def versions_of(libraries: Sequence[str]) -> dict[str, str]:
    """Library → its installed version. InputError when one is not installed."""
    try:
        return {library: importlib.metadata.version(library) for library in libraries}
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(f"the package {error.name} is not installed; install this stage's extra") from error


def cache_key(options: StageOptions, inputs: Mapping[str, Input]) -> str:
    """32 hexadecimal digits."""
    value = {
        "stages": options.cache_versions(),
        "versions": versions_of(options.libraries),
        "configuration": configuration_of(options),
        "inputs": {name: given.digest for name, given in inputs.items()},
    }
    return digest_of(value)[:32]
