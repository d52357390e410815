"""Logs: one line a record, and no secret in any of them."""

import io
import logging
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zhllama.errors import InputError
from zhllama.secret_text import mask
from zhllama.stage.log import OneLine, set_up_logging


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("Authorization: Bearer abc.def-ghi", "abc.def-ghi"),
        ("{'Authorization': 'Bearer abcdefgh'}", "abcdefgh"),
        ('{"x-api-key": "abcdefgh"}', "abcdefgh"),
        ("sent Bearer abcdefgh to", "abcdefgh"),
        ("Authorization: Basic dXNlcjpwYXNz", "dXNlcjpwYXNz"),
        (
            "Authorization: AWS4-HMAC-SHA256 Credential=AKIAX/20260101/us-east-1/s3/aws4_request, "
            "SignedHeaders=host, Signature=0123abcd",
            "0123abcd",
        ),
        ("Authorization: AWS4-HMAC-SHA256 Credential=AKIAX/20260101/us-east-1/s3/aws4_request", "AKIAX"),
        ("GET https://bucket/key?X-Amz-Signature=0123abcd&x=1", "0123abcd"),
        ("GET https://bucket/key?X-Amz-Security-Token=FwoGZ%2F&x=1", "FwoGZ"),
        ("<Message>https://b/k?AWSAccessKeyId=id-of-mine</Message>", "id-of-mine"),
        ("X-Goog-Credential=someone%40x", "someone"),
        ("the key hf_abcdefghijklmnopqrstuvwxyz was refused", "hf_abcdefghijklmnopqrstuvwxyz"),
        ("https://user:hunter2@host/path", "hunter2"),
        ("api_key=abcdefgh", "abcdefgh"),
        ("API_KEY=correcthorse and more", "correcthorse"),
        ("Authorization: Negotiate YIIabcd", "YIIabcd"),
        ("x-api-key: abcdefgh", "abcdefgh"),
        ("X-Api-Key: sk-1234abcd and more", "sk-1234abcd"),
        ("API_KEY: 0123abcd is wrong", "0123abcd"),
        ("'authorization': 'hunter'", "hunter"),
    ],
)
def test_a_secret_that_a_library_logs_is_masked(text, secret):
    assert secret not in mask(text)
    assert "***" in mask(text)


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a:0.5,s3://bucket/b",
        "http://127.0.0.1:9000/bucket/key",
        "12:00:01 INFO stage: 8,000 pieces, 1.85 tokens per character",
        "signature of the function: f(x)",
        "see https://host/a@b",
        "serve: ZHLLAMA_API_KEY: an API key has 16 or more ASCII characters and no blank",
        "OPENAI_API_KEY: it is empty; put the key in it",
        "error: Authorization: the header is missing",
        "ZHLLAMA_API_KEY: something, it seems, is wrong",
        "a Bearer token is needed, or bearer authentication fails",
    ],
)
def test_ordinary_text_stays(text):
    assert mask(text) == text


@pytest.mark.parametrize(
    "name",
    ["AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "HF_TOKEN", "DB_PASSWORD", "My_Secret", "PASSPHRASE", "MYSQL_PASSWD"],
)
def test_the_values_of_secret_variables_are_masked_wherever_they_stand(monkeypatch, name):
    monkeypatch.setenv(name, "abcd1234efgh")
    assert mask("the key abcd1234efgh was refused (abcd1234efgh)") == "the key *** was refused (***)"


def test_what_is_no_secret_stays(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path))
    assert mask(f"false, and {tmp_path}") == f"false, and {tmp_path}"
    monkeypatch.setenv("TOKENIZERS_CACHE", "somewhere")
    monkeypatch.setenv("MAX_TOKENS", "12345678")
    assert mask("somewhere, 12345678") == "somewhere, 12345678"


def record(message: str, error: bool = False) -> str:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(OneLine("%(levelname)s %(name)s: %(message)s"))
    logger = logging.Logger("test")
    logger.addHandler(handler)
    try:
        if error:
            raise ValueError("first\nsecond")
        logger.info("%s", message)
    except ValueError:
        logger.exception("%s", message)
    return stream.getvalue()


@given(st.text(max_size=60))
def test_a_record_is_a_line(text):
    assert len(record(text).splitlines()) == 1


def test_a_traceback_is_a_line_too():
    line = record("it failed", error=True)
    assert line.count("\n") == 1
    assert "ValueError: first | second" in line


def test_an_unknown_level_is_refused(monkeypatch):
    monkeypatch.setenv("ZHLLAMA_LOG", "loud")
    with pytest.raises(InputError, match="ZHLLAMA_LOG=LOUD: no such level"):
        set_up_logging()


def test_what_libraries_tell_programmers_is_not_told_to_users():
    program = (
        "import warnings\n"
        "from zhllama.stage.log import set_up_logging\n"
        "set_up_logging()\n"
        "for kind, name in ((FutureWarning, 'transformers.modeling_utils'), (DeprecationWarning, 'torch.jit')):\n"
        "    warnings.warn_explicit('theirs', kind, 'a.py', 1, module=name)\n"
        "warnings.warn_explicit('the data is odd', UserWarning, 'a.py', 1, module='peft.utils')\n"
        "warnings.warn_explicit('ours', FutureWarning, 'a.py', 1, module='components.evaluate')\n"
    )
    said = [
        subprocess.run([sys.executable, *more, "-c", program], capture_output=True, text=True, check=True).stderr
        for more in ((), ("-Wdefault",))
    ]
    assert "theirs" not in said[0]
    assert "the data is odd" in said[0]
    assert "ours" in said[0]
    assert "theirs" in said[1]
