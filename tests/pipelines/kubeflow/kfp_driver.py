"""KFP 2.17.0's way from a task to its command, written down a second time: what the local runner is held against.

Two programs do it on a cluster. The driver takes the values that the task passes (a component's defaults do not count),
checks their types, and replaces inputs in every word that names no output. The launcher then replaces what it knows in
what is left, one placeholder after another in the order of a Go map: where the order matters, nobody knows the result,
and that is an error here. Works on the compiled YAML alone, and shares nothing with the code that it judges.

    resolve_all(path, {"store": "s3://b/a"})  # {"convert-weights": ["python", "-m", …], …}, or DriverError
    unpassed(path)                            # ["convert-weights: max_positions", …]: what no task passes
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

INPUT = re.compile(r"\{\{\$\.inputs\.parameters\['(.+?)']}}")
MISSING = object()
TYPES = {bool: "BOOLEAN", str: "STRING", list: "LIST", dict: "STRUCT"}
STAND_INS = {
    "STRING": "s3://b/made",
    "NUMBER_INTEGER": 7,
    "NUMBER_DOUBLE": 0.5,
    "BOOLEAN": True,
    "LIST": [],
    "STRUCT": {},
}


class DriverError(Exception):
    """What the driver's log would say."""


# --- values as texts --------------------------------------------------------------------------------------------------


def shortest(number: float) -> tuple[str, str, int]:
    """Sign, fewest digits that are this number, and its decimal exponent."""
    mantissa, exponent = f"{Decimal(repr(abs(float(number)))):e}".lower().split("e")
    return "-" if str(number).startswith("-") else "", mantissa.replace(".", ""), int(exponent)


def without_exponent(number: float) -> str:
    """Go's FormatFloat(n, 'f', -1)."""
    sign, digits, exponent = shortest(number)
    digits = digits.rstrip("0") or "0"
    if exponent < 0:
        return f"{sign}0.{'0' * (-exponent - 1)}{digits}" if digits != "0" else f"{sign}0"
    digits = digits.ljust(exponent + 1, "0")
    whole, fraction = digits[: exponent + 1], digits[exponent + 1 :]
    return f"{sign}{whole}{'.' + fraction if fraction else ''}"


def scientific(number: float, width: int) -> str:
    sign, digits, exponent = shortest(number)
    fraction = digits[1:].rstrip("0")
    return f"{sign}{digits[0]}{'.' + fraction if fraction else ''}e{'+-'[exponent < 0]}{abs(exponent):0{width}d}"


def go_json(value: Any) -> str:
    """Go's json.Marshal of a decoded value."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{go_json(key)}:{go_json(item)}" for key, item in sorted(value.items())) + "}"
    if isinstance(value, list):
        return f"[{','.join(map(go_json, value))}]"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        small = value != 0 and abs(value) < 1e-6
        return scientific(value, 1) if small or abs(value) >= 1e21 else without_exponent(value)
    text = json.dumps(value, ensure_ascii=False)
    return re.sub("[<>&\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text)


def launcher_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return without_exponent(value)
    return value if isinstance(value, str) else go_json(value)


def driver_text(value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if float(value).is_integer() and abs(value) < 2**63:
            return str(int(value))
        return scientific(value, 2) if not -4 <= shortest(value)[2] < 6 else without_exponent(value)
    return launcher_text(value)


# --- the inputs of a task ---------------------------------------------------------------------------------------------


class Pipeline:
    """A compiled pipeline, its arguments, and what its steps may be taken to have written."""

    def __init__(self, documents: Sequence[Any], arguments: Mapping[str, Any]) -> None:
        self.spec = documents[0]
        self.kubernetes: dict[str, Any] = {}
        for document in documents[1:]:
            self.kubernetes |= document["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        self.arguments = dict(arguments)
        for name, given in self.parameters(self.spec["root"]).items():
            if name in self.arguments:
                continue
            if given.get("defaultValue") is None and not given.get("isOptional"):
                raise DriverError(f"the pipeline's parameter {name} has no value")
            self.arguments[name] = given.get("defaultValue")

    @staticmethod
    def parameters(component: Any) -> dict[str, Any]:
        return component.get("inputDefinitions", {}).get("parameters", {})

    def component(self, task: Any) -> Any:
        return self.spec["components"][task["componentRef"]["name"]]

    def executor(self, component: Any) -> Any:
        return self.spec["deploymentSpec"]["executors"][component["executorLabel"]]["container"]

    def steps(self, graph: Any = None, given: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple]:
        """Path, component, inputs, graph and graph's inputs of each step."""
        graph = graph or self.spec["root"]
        given = self.arguments if given is None else given
        for name, task in sorted(graph["dag"]["tasks"].items()):
            component = self.component(task)
            inputs = self.inputs(name, task, component, graph, given)
            if "dag" in component:
                yield from self.steps(component, inputs, (*path, name))
            else:
                yield (*path, name), task, component, inputs, graph, given

    def inputs(self, name: str, task: Any, component: Any, graph: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        declared = self.parameters(component)
        passed = task.get("inputs", {}).get("parameters", {})
        found: dict[str, Any] = {}
        nulls = set()
        for key, one in declared.items() if "dag" in component else ():
            if key not in passed and one.get("isOptional"):
                found[key] = one.get("defaultValue")
                nulls |= {key} if found[key] is None else set()
        for key, source in passed.items():
            value = self.value(source, name, graph, given)
            if value is MISSING:
                if not declared.get(key, {}).get("isOptional"):
                    raise DriverError(f"{name}: the resolved input parameter is null: {key}")
                continue
            found[key] = value
        for key, one in declared.items():
            if key not in found:
                if not one.get("isOptional") and one.get("defaultValue") is None:
                    raise DriverError(f'{name}: neither value nor default value for non-optional parameter "{key}"')
                continue
            if key not in nulls:
                found[key] = self.typed(found[key], one["parameterType"], f"{name}: {key}")
        return found

    @staticmethod
    def typed(value: Any, kind: str, where: str) -> Any:
        if kind == "STRING":
            return launcher_text(value)
        has = TYPES.get(type(value), "NUMBER")
        if value is None or not kind.startswith(has):
            raise DriverError(f"{where}: type mismatch: expect {kind}, got {value!r}")
        return value

    def value(self, source: Any, task: str, graph: Any, given: Mapping[str, Any]) -> Any:
        """A value; MISSING for the null of an optional parameter."""
        if "runtimeValue" in source:
            constant = source["runtimeValue"]["constant"]
            known = {
                "{{$.pipeline_job_uuid}}": "run-id",
                "{{$.pipeline_job_name}}": "run name",
                "{{$.pipeline_job_resource_name}}": "run-resource",
                "{{$.pipeline_task_name}}": task,
                "{{$.pipeline_task_uuid}}": "17",
            }
            return known.get(constant, constant) if isinstance(constant, str) else constant
        if "componentInputParameter" in source:
            name = source["componentInputParameter"]
            if name not in given:
                raise DriverError(f"{task}: parent DAG does not have input parameter {name}")
            return MISSING if given[name] is None else given[name]
        output = source["taskOutputParameter"]
        kinds = self.component(graph["dag"]["tasks"][output["producerTask"]])["outputDefinitions"]["parameters"]
        return STAND_INS[kinds[output["outputParameterKey"]]["parameterType"]]

    def check_pod(self, where: str, component: Any, inputs: Mapping[str, Any], graph: Any, given: Any) -> None:
        """What else of a step the driver resolves: image, resources, names of secrets, placement."""
        container = self.executor(component)
        texts = [container["image"]]
        for value in container.get("resources", {}).values():
            texts += value.values() if isinstance(value, dict) else [value]
        for text in texts:
            for name in re.findall(r"\$\.inputs\.parameters\['(.+?)']", str(text)):
                if not isinstance(inputs.get(name), str):
                    raise DriverError(f"{where}: {text} is not a text among its inputs: {inputs.get(name)!r}")
        for settings in self.kubernetes.get(component["executorLabel"], {}).values():
            for one in settings if isinstance(settings, list) else [settings]:
                for key, source in one.items() if isinstance(one, dict) else ():
                    if key.endswith("NameParameter"):
                        name = self.value(source, where, graph, given)
                        if name is not MISSING and (not isinstance(name, str) or not name):
                            raise DriverError(f"{where}: {key}: Expected a non-empty string")


# --- the words of a command -------------------------------------------------------------------------------------------


def driven(words: Sequence[str], inputs: Mapping[str, Any]) -> list[str]:
    """The driver's round."""

    def one(match: re.Match[str]) -> str:
        if match[1] not in inputs:
            raise DriverError(f'failed to resolve input parameters: parameter "{match[1]}" not found in executor input')
        return driver_text(inputs[match[1]])

    found: list[str] = []
    for word in words:
        if "$.outputs" in word:
            found.append(word)
        elif word.strip().startswith('{"IfPresent":'):
            choice = json.loads(word)["IfPresent"]
            texts = choice.get("Then" if inputs.get(choice["InputName"]) is not None else "Else")
            texts = [] if texts is None else [texts] if isinstance(texts, str) else texts
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise DriverError(f"failed to resolve condition: unexpected type in {word}")
            found += [INPUT.sub(one, text) for text in texts]
        else:
            found.append(INPUT.sub(one, word))
    return found


def launched(words: Sequence[str], placeholders: Mapping[str, str], executor_input: Any = None) -> list[str]:
    """The launcher's round. DriverError where the order decides, or where something is left that nobody replaces."""
    found = []
    for template in words:
        # first of all, so that what stands in it is replaced with the rest
        word = template.replace("{{$}}", json.dumps(executor_input, ensure_ascii=False))
        results = set()
        for order in (sorted(placeholders), sorted(placeholders, reverse=True)):
            text = word
            for placeholder in order:
                text = text.replace(placeholder, placeholders[placeholder])
            results.add(text)
        if len(results) > 1:
            raise DriverError(f"{word}: the launcher makes one of {sorted(results)} of it")
        if "{{$." in text or text.startswith(('{"Concat"', '{"IfPresent"')):
            raise DriverError(f"{text}: it stays as it stands")
        found.append(text)
    return found


def placeholders(inputs: Mapping[str, Any], artifacts: Mapping[str, str], outputs: Mapping[str, str]) -> dict[str, str]:
    """What the launcher knows. outputs: the text inside `$.outputs.…` → what stands there."""
    found = {f"{{{{$.inputs.parameters['{name}']}}}}": launcher_text(value) for name, value in inputs.items()}
    for name, path in artifacts.items():
        found |= {f"{{{{$.inputs.artifacts['{name}'].{kind}}}}}": path for kind in ("uri", "path")}
    return found | {f"{{{{$.outputs.{name}}}}}": path for name, path in outputs.items()}


def outputs_of(component: Any, folder: str = "/tmp/kfp/outputs") -> dict[str, str]:
    defined = component.get("outputDefinitions", {})
    found = {"output_file": f"{folder}/executor_output.json"}
    found |= {f"parameters['{name}'].output_file": f"{folder}/{name}" for name in defined.get("parameters", {})}
    for name in defined.get("artifacts", {}):
        found |= {f"artifacts['{name}'].{kind}": f"{folder}/{name}" for kind in ("uri", "path")}
    return found


def resolve_documents(documents: Sequence[Any], arguments: Mapping[str, Any], folder: str = "") -> dict[str, list[str]]:
    pipeline = Pipeline(documents, arguments)
    found = {}
    for path, task, component, inputs, graph, given in pipeline.steps():
        where = "/".join(name for name in path if not re.fullmatch(r"exit-handler-\d+", name))
        container = pipeline.executor(component)
        artifacts = {name: f"/in/{name}" for name in task.get("inputs", {}).get("artifacts", {})}
        outputs = outputs_of(component, f"{folder}/{where}")
        known = placeholders(inputs, artifacts, outputs)
        try:
            words = driven([*container["command"], *container.get("args", [])], inputs)
            found[where] = launched(words, known, {"inputs": {"parameterValues": inputs}, "outputs": outputs})
            pipeline.check_pod(where, component, inputs, graph, given)
        except DriverError as error:
            raise DriverError(f"{where}: {error}") from error
    return found


def resolve_all(package: Path, arguments: Mapping[str, Any]) -> dict[str, list[str]]:
    """The command of each step of a compiled pipeline, as a cluster would run it. DriverError for one that it would
    not. Keys: the task's name, with the sub-pipelines around it (`stage/merge`); an exit handler is not named."""
    return resolve_documents(list(yaml.safe_load_all(package.read_text(encoding="utf-8"))), arguments)


def unpassed(package: Path) -> list[str]:
    """Inputs that a step's component declares and its task does not pass: `task: input`, sorted."""
    documents = list(yaml.safe_load_all(package.read_text(encoding="utf-8")))
    components = documents[0]["components"]
    found = set()
    for graph in (documents[0]["root"], *components.values()):
        for name, task in graph.get("dag", {}).get("tasks", {}).items():
            component = components[task["componentRef"]["name"]]
            passed = task.get("inputs", {}).get("parameters", {})
            if "dag" not in component:
                found |= {f"{name}: {key}" for key in Pipeline.parameters(component) if key not in passed}
    return sorted(found)
