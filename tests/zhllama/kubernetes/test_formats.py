"""Formats of single values, as Kubernetes' own tests have them."""

from decimal import Decimal
from typing import Any

import pytest

from pipelines.manifests.check.server.cron import schedule
from zhllama.kubernetes import formats


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (formats.dns_label, ["a", "a-1", "1", "a" * 63], ["", "A", "a_b", "a.b", "-a", "a-", "a" * 64]),
        (formats.dns_1035_label, ["a", "a-1"], ["", "1a", "a.b", "a" * 64]),
        (formats.subdomain, ["a", "a.b-c", "1.2", "a" * 253], ["", "a..b", ".a", "a.", "a_b", "A", "a.-b", "a" * 254]),
        (
            formats.qualified_name,
            ["a", "A_b.c", "a.io/B", "a/" + "b" * 63],
            ["", "a b", "/a", "a/", "A/b", "a/b/c", "_a", "b" * 64, "a" * 254 + "/b"],
        ),
        (formats.annotation_key, ["A.io/b"], ["a b", "a/b/c"]),
        (formats.label_value, ["", "a", "A_1.b", "a" * 63], ["a b", "-a", "a/", "中", "a" * 64]),
        (formats.path_segment, ["A b", "a:b", "..."], [".", "..", "a/b", "a%b"]),
        (formats.port_name, ["a", "http-1"], ["", "80", "A", "a--b", "-a", "a_b", "a" * 16]),
        (formats.variable, ["a b", "1", "a-b.c"], ["a=b", "中", "a\tb"]),
        (formats.config_key, ["a", "A_.-", "...".replace("..", "a")], ["", ".", "..", "..a", "a/b", "a b", "a" * 254]),
        (formats.ip, ["10.9.8.7", "::1", "010.001.0.7"], ["", "10.0.0", "10.0.0.256", "a"]),
        (formats.cidr, ["10.0.0.0/8", "10.1.2.3/8", "::/0"], ["10.0.0.0", "10.0.0.0/33", "a/8", "10.0.0.0/255.0.0.0"]),
        (formats.relative_path, ["a", "a/..b"], ["/a", "..", "a/../b"]),
        (formats.base64_text, ["", "YQ==", "YW\nE="], ["a", "YQ", "Y Q="]),
        (formats.count_or_share, [0, 1, "0%", "150%"], [-1, "1", "25 percent", "%", "-1%"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_a_format_takes(check: Any, good: list[Any], bad: list[Any]) -> None:
    assert [value for value in good if check(value)] == []
    assert [value for value in bad if not check(value)] == []


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("500m", "0.5"), ("4Gi", 4 * 2**30), ("4.Gi", 4 * 2**30), (".5", "0.5"), ("+4", 4), ("-1", -1), ("1e3", 1000),
        ("2E", 2 * 10**18), ("1E3", 1000),
        ("3n", "3e-9"), ("3u", "3e-6"), (7, 7), (0.5, "0.5"), ("1e-2", "0.01"),
        ("64GB", None), ("4gi", None), ("4 Gi", None), ("4K", None), ("", None), (".", None), ("1e", None),
        ("e3", None),
        ("1_0", None), (True, None), (None, None), ([], None),
    ],
)  # fmt: skip
def test_a_quantity_is_read_as_kubernetes_reads_it(text: Any, number: Any) -> None:
    assert formats.amount(text) == (None if number is None else Decimal(number))
    assert bool(formats.quantity(text)) == (number is None)


@pytest.mark.parametrize(
    "text",
    [
        "* * * * *", "*/15 0 1,15 * 1-5", "0 0 ? * sun", "@hourly", "@every 1h30m", "5/10 * * JAN-mar *", "0 0 31 12 6",
    ],
)  # fmt: skip
def test_a_schedule_is_taken(text: str) -> None:
    assert schedule(text) == ""


@pytest.mark.parametrize(
    "text",
    [
        "", "* * * *", "* * * * * *", "60 * * * *", "* 24 * * *", "* * 0 * *", "* * * 13 *", "* * * * 7", "5-1 * * * *",
        "*/0 * * * *", "*/a * * * *", "a * * * *", "1-2-3 * * * *", "@weekends", "@every day", "TZ=UTC 0 * * * *",
        "CRON_TZ=UTC 0 * * * *", "1/2/3 * * * *", "-1 * * * *",
    ],
)  # fmt: skip
def test_a_schedule_is_refused(text: str) -> None:
    assert schedule(text)
