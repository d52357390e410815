"""A model's own chat template is another's program: one that fails, or does not end, is named."""

import jinja2.sandbox
import pytest

from components.serve import check
from zhllama.errors import InputError

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "line"),
    [
        (ENDLESS, "model: its chat template does not end; export it again"),
        ("{{ raise_it() }}", "model: its chat template cannot be read .'raise_it' is undefined.; export it again"),
        ("{{ 1 / 0 }}", "cannot be read"),
        ("{% for x in", "cannot be read"),
        ("{{ messages[0] + 1 }}", "cannot be read"),
    ],
    ids=["endless", "undefined", "arithmetic", "syntax", "type"],
)
def test_a_template_that_does_not_end_or_fails_is_named(monkeypatch, template, line):
    monkeypatch.setattr(check, "RENDERING", 0.2)
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment()
    with pytest.raises(InputError, match=line), check._template("model", "export it again"):
        environment.from_string(template).render(messages=[{}])
