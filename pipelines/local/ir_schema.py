"""What a compiled pipeline's file may hold: its YAML, read within bounds, and its keys with what stands under them.

A pipeline may be anybody's. What is no YAML, no JSON, or of another shape than KFP's compiler writes is refused in one
line, so that what reads it after this finds names where names are, and no more than it can hold.
"""

from pathlib import Path
from typing import Any

from zhllama.artifacts import yaml_file
from zhllama.errors import InputError

LONGEST = 4 * 2**20
"""Bytes of a file: twenty times our own pipeline, and more than a cluster takes in one Workflow."""
LONGEST_NAME = 200
DEEPEST = 50
"""Sub-pipelines inside one another."""


def keys(*names: str, **more: Any) -> dict[str, Any]:
    return dict.fromkeys(names) | more


_NAME = keys(name=str)
_TASK = keys(
    componentRef=_NAME, dependentTasks=[str], taskInfo={"name": str, "*": None},
    # our pipelines switch KFP's cache off; here only the runner's own record decides
    cachingOptions=None,
    # a condition has a refusal of its own
    triggerPolicy=keys("condition", strategy=str),
    inputs={
        "parameters": {
            "*": keys(
                componentInputParameter=str, runtimeValue=keys("constant"),
                taskOutputParameter=keys(producerTask=str, outputParameterKey=str),
            )
        },
        "artifacts": {
            "*": keys(
                componentInputArtifact=str, taskOutputArtifact=keys(producerTask=str, outputArtifactKey=str)
            )
        },
    },
)  # fmt: skip
_RESULTS = {
    "parameters": {"*": keys("valueFromOneof", valueFromParameter=keys(producerSubtask=str, outputParameterKey=str))},
    "artifacts": {"*": {"artifactSelectors": [keys(producerSubtask=str, outputArtifactKey=str)]}},
}
_COMPONENT = keys(
    executorLabel=str,
    dag={"tasks": {"*": _TASK}, "outputs": _RESULTS},
    inputDefinitions={
        "parameters": {"*": keys("defaultValue", "description", parameterType=str, isOptional=bool)},
        "artifacts": {"*": keys("artifactType", "description")},
    },
    outputDefinitions={"parameters": {"*": {"parameterType": str, "*": None}}, "artifacts": {"*": None}},
)
# resources say what to reserve in a cluster; this machine has what it has
_EXECUTOR = {"container": keys("image", "resources", command=list, args=list, env=[keys("value", name=str)])}
PACKAGE = keys(
    "schemaVersion", "sdkVersion", "defaultPipelineRoot",
    pipelineInfo={"name": str, "*": None}, components={"*": _COMPONENT}, root=_COMPONENT,
    deploymentSpec={"executors": {"*": _EXECUTOR}},
)  # fmt: skip
"""What the runner knows: the keys of a mapping (`*`: any) with what stands under them; None: whatever."""
_MOUNTED = {"configMapAsVolume": [dict], "secretAsVolume": [dict], "*": None}
PLATFORM = {
    "platforms": {"kubernetes": {"deploymentSpec": {"executors": {"*": _MOUNTED}, "*": None}, "*": None}, "*": None},
    "*": None,
}
KINDS = ("STRING", "NUMBER_INTEGER", "NUMBER_DOUBLE", "BOOLEAN", "LIST", "STRUCT")
MEANINGLESS = keys(
    "secretAsEnv", "fieldPathAsEnv", "emptyDirMounts", "podMetadata", "nodeSelector", "nodeAffinity", "tolerations",
    "podAffinity", "imagePullSecret", "imagePullPolicy", "activeDeadlineSeconds", "securityContext",
)  # fmt: skip
"""Kubernetes settings: where a pod is placed means nothing here."""


def documents_of(path: Path) -> list[Any]:
    """A file's documents. InputError for what no compiled pipeline is."""
    try:
        with open(path, "rb") as file:
            # its size says nothing where it is a device
            content = file.read(LONGEST + 1)
        if len(content) > LONGEST:
            raise InputError(f"{path}: it has more than {LONGEST:,} bytes; give a compiled pipeline")
        found = yaml_file.documents_of(content.decode(), aliases=False)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give a compiled pipeline") from error
    except ValueError as error:
        raise InputError(f"{path}: not YAML of a compiled pipeline ({error}); give one") from error
    return [document for document in found if document is not None]


def check_json(value: Any, where: str) -> None:
    """InputError for what no JSON has, and so no pipeline: dates, sets, keys that are no texts, numbers beyond a
    float's, halves of characters, and texts that no command can be given."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise damaged(f"{where}: the key {key!r:.80} is no text")
            check_json(key, where)
            check_json(inner, where)
    elif isinstance(value, list):
        for inner in value:
            check_json(inner, where)
    elif isinstance(value, str):
        if "\0" in value or not _is_whole(value):
            raise damaged(f"{where}: {value!r:.80} holds what no text of a command may")
    elif isinstance(value, int | float):
        if not abs(value) < 2**1023:
            raise damaged(f"{where}: {value!r:.80} is no number that JSON has")
    elif value is not None:
        raise damaged(f"{where}: {value!r:.80} is nothing that JSON has; put it in quotes")


def _is_whole(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def check_known(value: Any, known: Any, where: str) -> None:
    """Refuses, by name, every key that is neither understood nor without meaning on one machine."""
    if isinstance(known, list):
        if not isinstance(value, list):
            raise damaged(f"{where}: {value!r:.80} where a list is needed")
        for item in value:
            check_known(item, known[0], where)
    elif isinstance(known, type):
        if not isinstance(value, known):
            raise damaged(f"{where}: {value!r:.80} where {_WORDS[known]} is needed")
        if isinstance(value, str):
            _check_name(value, where)
    elif known is not None:
        if not isinstance(value, dict):
            raise damaged(f"{where}: {value!r:.80} where a mapping is needed")
        for key, inner in value.items():
            _check_name(key, where)
            if key not in known and "*" not in known:
                raise InputError(f"{where}: it uses {key}, which the local runner does not know; run it on a cluster")
            check_known(inner, known.get(key, known.get("*")), where if key in known else f"{where}: {key}")


_WORDS = {str: "a name", bool: "true or false", list: "a list", dict: "a mapping"}


def _check_name(name: str, where: str) -> None:
    if not name.isprintable() or len(name.encode()) > LONGEST_NAME:
        raise damaged(f"{where}: {name!r:.80} is no name")


def damaged(what: str) -> InputError:
    return InputError(f"{what}; the compiled pipeline is damaged")
