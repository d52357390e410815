"""The conditions of If, Elif and Else: the CEL expressions that the SDK writes, and no others. Pure.

Comparisons of inputs with literals, int() and double() around them, `!(…)`, `&&`, `||`. As in CEL, a text is neither
equal nor unequal to a number or a boolean: that comparison is an error.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from components.shared.errors import InputError


@dataclass(frozen=True)
class Condition:
    """A CEL expression as the SDK writes them: an operator and its operands.

    Operators: and, or, not, ==, !=, <, <=, >, >=, int, double, input (of a name), literal.
    """

    operator: str
    operands: tuple[Any, ...]


_TOKEN = re.compile(
    r"\s*(?:(?P<input>inputs\.parameter_values\['[^']+'\])|(?P<text>'(?:[^'\\]|\\.)*')|(?P<number>-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
    r"|(?P<word>true|false|int|double)\b|(?P<sign>&&|\|\||==|!=|<=|>=|[<>!()]))"
)


def parse_condition(text: str, where: str) -> Condition:
    """The condition of a task. InputError for anything the SDK's If, Elif and Else do not write."""
    tokens: list[tuple[str, str]] = []
    at = 0
    while text[at:].strip():
        found = _TOKEN.match(text, at)
        if found is None:
            raise InputError(f"{where}: the condition {text!r} uses {text[at:].split()[0]!r}, which is not known here")
        tokens.append((str(found.lastgroup), found[str(found.lastgroup)]))
        at = found.end()
    parser = _Parser(tokens, f"{where}: the condition {text!r} is not understood")
    return parser.whole()


class _Parser:
    """Recursive descent, CEL's precedences: || below && below comparison below !."""

    def __init__(self, tokens: list[tuple[str, str]], complaint: str) -> None:
        self._tokens = tokens
        self._complaint = complaint

    def whole(self) -> Condition:
        found = self._joined("||", "or", lambda: self._joined("&&", "and", self._compared))
        if self._tokens:
            raise InputError(self._complaint)
        return found

    def _take(self, *wanted: str) -> str:
        if self._tokens and self._tokens[0][1] in wanted:
            return self._tokens.pop(0)[1]
        return ""

    def _joined(self, sign: str, operator: str, part: Callable[[], Condition]) -> Condition:
        parts = [part()]
        while self._take(sign):
            parts.append(part())
        return parts[0] if len(parts) == 1 else Condition(operator, tuple(parts))

    def _compared(self) -> Condition:
        left = self._single()
        sign = self._take("==", "!=", "<=", ">=", "<", ">")
        return Condition(sign, (left, self._single())) if sign else left

    def _single(self) -> Condition:
        if self._take("!"):
            return Condition("not", (self._single(),))
        if self._take("("):
            inner = self._joined("||", "or", lambda: self._joined("&&", "and", self._compared))
            return self._closed(inner)
        if cast := self._take("int", "double"):
            if not self._take("("):
                raise InputError(self._complaint)
            return self._closed(Condition(cast, (self._single(),)))
        if not self._tokens:
            raise InputError(self._complaint)
        kind, word = self._tokens.pop(0)
        if kind == "input":
            return Condition("input", (word[len("inputs.parameter_values['") : -2],))
        if kind == "text":
            return Condition("literal", (re.sub(r"\\(.)", r"\1", word[1:-1]),))
        if kind == "number":
            return Condition("literal", (float(word) if re.search(r"[.e]", word) else int(word),))
        if word in ("true", "false"):
            return Condition("literal", (word == "true",))
        raise InputError(self._complaint)

    def _closed(self, inner: Condition) -> Condition:
        if not self._take(")"):
            raise InputError(self._complaint)
        return inner


def names_in(condition: Condition) -> Iterator[str]:
    if condition.operator == "input":
        yield str(condition.operands[0])
    for operand in condition.operands:
        if isinstance(operand, Condition):
            yield from names_in(operand)


def holds(condition: Condition, values: Mapping[str, Any]) -> bool:
    """Whether a condition is true of these inputs. InputError where CEL would compare a text with a number."""
    found = _evaluate(condition, values)
    if not isinstance(found, bool):
        raise InputError(f"a condition gives {found!r} where true or false is needed")
    return found


def _evaluate(condition: Condition, values: Mapping[str, Any]) -> Any:
    operator, operands = condition.operator, condition.operands
    if operator == "literal":
        return operands[0]
    if operator == "input":
        return values.get(operands[0])
    if operator == "and":
        return all(holds(part, values) for part in operands)
    if operator == "or":
        return any(holds(part, values) for part in operands)
    if operator == "not":
        return not holds(operands[0], values)
    if operator in ("int", "double"):
        try:
            return (int if operator == "int" else float)(_evaluate(operands[0], values))
        except (TypeError, ValueError) as error:
            raise InputError(f"a condition takes {operator} of {_evaluate(operands[0], values)!r}") from error
    left, right = (_evaluate(part, values) for part in operands)
    if _sort(left) != _sort(right):
        raise InputError(f"a condition compares {left!r} with {right!r}; give the parameter a value of its type")
    if operator in ("==", "!="):
        return (left == right) is (operator == "==")
    if operator == "<":
        return left < right
    if operator == "<=":
        return left <= right
    return left > right if operator == ">" else left >= right


def _sort(value: Any) -> type:
    return float if isinstance(value, int) and not isinstance(value, bool) else type(value)
