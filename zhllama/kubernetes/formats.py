"""Formats of single values: each function says what is wrong with one, in a few words, or nothing ("")."""

import base64
import binascii
import ipaddress
import re
from collections.abc import Callable, Collection, Mapping
from decimal import Decimal
from typing import Any

Check = Callable[[Any], str]
"""A value → what is wrong with it, "" for a good one."""

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_LABEL_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(rf"{_LABEL.pattern}(\.{_LABEL.pattern})*")
_NAME = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]")
_CONFIG_KEY = re.compile(r"[-._a-zA-Z0-9]+")
_QUANTITY = re.compile(r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))(?:([numkMGTPE]|[KMGTPE]i)|[eE]([+-]?[0-9]+))?")
EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
OPERATORS = ("Equal", "Exists")
NODE_OPERATORS = ("In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt")
_PERCENT = re.compile(r"[0-9]+%")
_SCALE = {"n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("1e-3"), "k": Decimal(1000)}
_SCALE |= {letter: Decimal(1000) ** power for power, letter in enumerate("MGTPE", start=2)}
_SCALE |= {f"{letter}i": Decimal(1024) ** power for power, letter in enumerate("KMGTPE", start=1)}
MOST = 2**31 - 1


def dns_label(text: str) -> str:
    if len(text) > 63:
        return "must have at most 63 characters"
    return "" if _LABEL.fullmatch(text) else "must be lower-case letters, digits and -, a letter or digit at both ends"


def dns_1035_label(text: str) -> str:
    if len(text) > 63:
        return "must have at most 63 characters"
    return "" if _LABEL_1035.fullmatch(text) else "must be lower-case letters, digits and -, a letter first"


def subdomain(text: str) -> str:
    if len(text) > 253:
        return "must have at most 253 characters"
    if _SUBDOMAIN.fullmatch(text):
        return ""
    return "must be lower-case letters, digits, - and ., a letter or digit at the ends of each part"


def wildcard_or_subdomain(text: str) -> str:
    return subdomain(text[2:] if text.startswith("*.") else text)


def path_segment(text: str) -> str:
    return (
        "may be neither . nor .., and contain neither / nor %" if text in (".", "..") or set(text) & set("/%") else ""
    )


def qualified_name(text: str) -> str:
    """A label's key: an optional prefix (a subdomain), a slash, a name."""
    prefix, slash, name = text.rpartition("/")
    if slash and (not prefix or subdomain(prefix)):
        return "the prefix before / must be a domain in lower-case letters"
    if len(name) > 63 or not _NAME.fullmatch(name):
        return (
            "must be letters, digits, -, _ and ., at most 63, a letter or digit at both ends, after an optional prefix/"
        )
    return ""


def annotation_key(text: str) -> str:
    return qualified_name(text.lower())


def label_value(text: str) -> str:
    if text and (len(text) > 63 or not _NAME.fullmatch(text)):
        return "must be empty, or letters, digits, -, _ and ., at most 63, a letter or digit at both ends"
    return ""


def resource_name(kind: str) -> str:
    """Of what a container asks for."""
    if wrong := qualified_name(kind):
        return wrong
    if "/" not in kind:
        standard = kind in ("cpu", "memory", "ephemeral-storage") or kind.startswith("hugepages-")
        return "" if standard else "is no resource of containers: cpu, memory, ephemeral-storage or one with a domain"
    if kind.startswith("requests.") or qualified_name(f"requests.{kind}"):
        return "is no name of an extended resource"
    return ""


def port_name(text: str) -> str:
    good = len(text) <= 15 and re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", text) and re.search("[a-z]", text)
    return "" if good else "a port's name is lower-case letters, digits and single -, at most 15, with a letter"


def port_number(number: int) -> str:
    return "" if 1 <= number <= 65535 else "must be between 1 and 65535"


def port(value: Any) -> str:
    """A port's number, or its name."""
    return port_name(value) if isinstance(value, str) else port_number(value) if isinstance(value, int) else ""


def variable(text: str) -> str:
    good = all(" " <= character <= "~" and character != "=" for character in text)
    return "" if good else "a variable's name is printable ASCII without ="


def config_key(text: str) -> str:
    if len(text) > 253 or not _CONFIG_KEY.fullmatch(text):
        return "a key is letters, digits, -, _ and ., at most 253"
    return "may not be . nor start with .." if text == "." or text.startswith("..") else ""


def header(text: str) -> str:
    return "" if re.fullmatch(r"[-A-Za-z0-9]+", text) else "must be the name of an HTTP header"


def relative_path(text: str) -> str:
    """Without a way up and out."""
    if text.startswith("/"):
        return "must be a relative path"
    return "must not contain '..'" if ".." in text.split("/") else ""


def file_in_volume(text: str) -> str:
    return relative_path(text) or ("must not start with '..'" if text.startswith("..") else "")


def without_way_up(text: str) -> str:
    return "must not contain '..'" if ".." in text.split("/") else ""


def absolute_path(text: str) -> str:
    return "" if text.startswith("/") else "must be an absolute path"


def ip(text: str) -> str:
    try:
        ipaddress.ip_address(_without_zeros(text))
    except ValueError:
        return "must be an IP address, as 10.9.8.7"
    return ""


def cidr(text: str) -> str:
    try:
        ipaddress.ip_network(_without_zeros(text), strict=False)
    except ValueError:
        return "must be a range of addresses, as 10.9.8.0/24"
    return "" if re.search(r"/[0-9]+$", text) else "must be a range of addresses with its mask, as 10.9.8.0/24"


def _without_zeros(text: str) -> str:
    """Older fields take leading zeros."""
    return text if ":" in text else re.sub(r"(^|\.)0+(?=[0-9])", r"\1", text)


def base64_text(text: str) -> str:
    try:
        base64.b64decode(re.sub(r"[\r\n]", "", text), validate=True)
    except (binascii.Error, ValueError):
        return "must be base64"
    return ""


def quantity(value: Any) -> str:
    if amount(value) is not None:
        return ""
    return "is no quantity: a number and m, k, M, G, T, P, E, Ki, Mi, Gi, Ti, Pi, Ei or an exponent, as 500m or 64Gi"


def amount(value: Any) -> Decimal | None:
    """A quantity as a number; None for what is none."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    found = _QUANTITY.fullmatch(str(value))
    if not found:
        return None
    return Decimal(found[1]) * (
        Decimal(10) ** max(-99, min(99, int(found[3]))) if found[3] else _SCALE.get(found[2], 1)
    )


def no_negative_quantity(value: Any) -> str:
    found = amount(value)
    return "must not be negative" if found is not None and found < 0 else ""


def positive_quantity(value: Any) -> str:
    found = amount(value)
    return "must be more than 0" if found is not None and found <= 0 else ""


def no_negative(number: int) -> str:
    return "" if number >= 0 else "must be 0 or more"


def positive(number: int) -> str:
    return "" if number > 0 else "must be more than 0"


def between(least: int, most: int) -> Check:
    return lambda number: "" if least <= number <= most else f"must be between {least} and {most}"


def mode(number: int) -> str:
    return "" if 0 <= number <= 0o777 else "must be between 0 and 0777 (octal; 511)"


def count_or_share(value: Any) -> str:
    """`1`, or `25%`."""
    if isinstance(value, str):
        return "" if _PERCENT.fullmatch(value) else "must be a number, or digits with % at the end"
    return no_negative(value) if isinstance(value, int) else ""


def one_of(*allowed: str) -> Check:
    return lambda value: "" if value in allowed else f"must be one of {', '.join(allowed)}"


def needed(check: Check | None = None) -> Check:
    """Neither absent nor empty, and good."""

    def checked(value: Any) -> str:
        if value is None or value == "" or value == [] or value == {}:
            return "is needed"
        return check(value) if check else ""

    checked.needed = True  # type: ignore[attr-defined]
    return checked


def given(check: Check) -> Check:
    """Good where it is given, be it empty: what Kubernetes does not fill in."""
    checked: Check = lambda value: "" if value is None else check(value)  # noqa: E731
    checked.needed = True  # type: ignore[attr-defined]
    return checked


def toleration(given: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of its fields beside one another: a field, and what is wrong with it."""
    key, operator, value = (str(given.get(name) or "") for name in ("key", "operator", "value"))
    wrong = []
    if not key and operator != "Exists":
        wrong.append(("operator", "must be Exists without a key: it tolerates all"))
    if operator == "Exists" and value:
        wrong.append(("value", "may not be given with Exists"))
    elif operator in ("", "Equal") and (said := label_value(value)):
        wrong.append(("value", f"{value!r} {said}"))
    if given.get("tolerationSeconds") is not None and given.get("effect") != "NoExecute":
        wrong.append(("effect", "must be NoExecute with tolerationSeconds"))
    return wrong


def node_requirement(given: Mapping[str, Any], of_fields: bool, required: bool) -> list[tuple[str, str]]:
    """The same of what an affinity asks of nodes. of_fields: of their fields, not of their labels; required: not only
    preferred, where values are any texts."""
    key, operator, values = str(given.get("key") or ""), given.get("operator"), given.get("values") or []
    if of_fields:
        wrong = [("key", "must be metadata.name in matchFields")] if key != "metadata.name" else []
        if operator not in ("In", "NotIn") or len(values) != 1:
            wrong.append(("operator", "must be In or NotIn in matchFields, with one value"))
        return wrong
    wrong = [("key", f"{key!r}: {said}")] if (said := qualified_name(key)) else []
    if operator in ("In", "NotIn"):
        said = (required and each(label_value)(values)) or ("" if values else f"are needed with {operator}")
    elif operator in ("Exists", "DoesNotExist"):
        said = f"may not be given with {operator}" if values else ""
    else:
        said = f"must be one with {operator}" if operator in ("Gt", "Lt") and len(values) != 1 else ""
    return [*wrong, ("values", said)] if said else wrong


def each(check: Check) -> Check:
    """Every text of a list."""
    return lambda values: next((f"{value!r} {wrong}" for value in values if (wrong := _said(check, value))), "")


def keys(check: Check) -> Check:
    return lambda values: each(check)(list(values))


def labels(values: Mapping[str, Any]) -> str:
    """Keys and values of labels."""
    for key, value in values.items():
        if wrong := qualified_name(key):
            return f"key {key!r} {wrong}"
        if wrong := _said(label_value, value):
            return f"{key}: {value!r} {wrong}"
    return ""


def annotations(values: Mapping[str, Any]) -> str:
    if sum(len(f"{key}{value}".encode()) for key, value in values.items()) > 256 * 1024:
        return "must have at most 262144 bytes in all"
    return next((f"key {key!r} {wrong}" for key in values if (wrong := annotation_key(key))), "")


def _said(check: Check, value: Any) -> str:
    return check(value) if isinstance(value, str) else ""


def repeated(values: Collection[Any]) -> list[int]:
    """The places of what stands a second time."""
    texts = [repr(value) for value in values]
    return [index for index, text in enumerate(texts) if text in texts[:index]]
