"""What looks like a secret: by a variable's name, or by the text itself. One look for logs, for what stores and servers
say, and for the manifests and settings of pods."""

import os
import re
from functools import lru_cache

from zhllama.mounted_secrets import READ

_NAME = re.compile(
    r"SECRET|TOKEN(?!IZ|S(_|$))|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY", re.IGNORECASE
)
_ITS_PLACE = re.compile(r"(_FILE|_PATH|_DIR|_URL|_NAME)$", re.IGNORECASE)
"""A variable that ends so says where a secret is, not what it is."""
_VALUE = re.compile(r"\b(AKIA[0-9A-Z]{16}|sk-[A-Za-z0-9_-]{20,}|hf_[A-Za-z0-9]{20,}|ghp_[A-Za-z0-9]{30,})\b")
_PASSWORD = re.compile(r"://[^\s/:@]+:[^\s/@]+@")
_AFTER = re.compile(
    r"""(?ix)
    ( (?:authorization|x-api-key|api[-_]key)['"]?\s*[:=]\s*
      (?: ['"]?(?:bearer|basic|digest|negotiate|aws4-hmac-sha256)\s+ | ['"]
        | (?!(?<=:\s)[a-z']{1,15}[\s,.;:]\s*[a-z]) )  # `API_KEY: an API key has …` is a sentence
    | \bbearer\s+ (?!(?:[a-z]{1,7}|auth[a-z]*|[a-z]*tokens?)(?![^\s,.;:)]))
    | \b(?:x-(?:amz|goog)-)?(?:signature|credential|security-token|awsaccesskeyid)=
    | ://[^\s/:@]+: (?=[^\s/@]+@)
    )
    [^\s'",&@<]+
    """
)


@lru_cache(maxsize=1024)
def is_secret_name(name: str) -> bool:
    """Whether a variable of that name holds a secret. Asked of each variable for each line of a log."""
    return _NAME.search(name) is not None and not _ITS_PLACE.search(name)


def is_secret(text: str) -> bool:
    """Whether a key that providers give out stands in the text, or an address with a password."""
    return _VALUE.search(text) is not None or _PASSWORD.search(text) is not None


def mask(text: str) -> str:
    """The text with every secret replaced by `***`: S3's mounted credentials, the values of this process's variables
    whose names say that they are secret, what follows `Authorization:`, `Bearer`, `Signature=` and the like, an
    address's password, keys."""
    for value in (*(value for name, value in os.environ.items() if is_secret_name(name)), *tuple(READ)):
        # short values would mask ordinary words ("true", a region)
        if len(value) >= 8 and not os.path.exists(value):
            text = text.replace(value, "***")
    return _VALUE.sub("***", _AFTER.sub(r"\1***", text))
