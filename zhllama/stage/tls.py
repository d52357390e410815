"""What a site asks of every pod that reaches out of it: certificates of its own, and its proxy.

The site's certificates are mounted at CA_FOLDER; a command that finds files in the folder that ZHLLAMA_CA names trusts
them beside the public authorities. The proxy comes from a secret (zhllama/mounted_secrets.py).
"""

import atexit
import os
import tempfile
from contextlib import ExitStack
from functools import cache
from pathlib import Path

from zhllama.errors import InputError

CA_FOLDER = "/etc/zhllama-ca"
CA_VARIABLE = "ZHLLAMA_CA"
BUNDLE_VARIABLE = "ZHLLAMA_CA_BUNDLE"
"""Names a file that gets all authorities, the public ones too: for a program that is not ours, later in the pod."""
CA_SUFFIXES = (".crt", ".pem")
_CERTIFICATE = "-----BEGIN CERTIFICATE-----"
TRUSTED = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
"""The variables by which boto3, requests, and OpenSSL and its like are told."""
PROXY_KEYS = ("HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY")


def trust_site() -> None:
    """Lets this process and its children trust the certificates in the folder that ZHLLAMA_CA names, if any are there.
    A variable that is set already is left as it is, but for certificates where a file is named: a secret's key holds
    them. InputError for a file that holds no certificate."""
    for name in TRUSTED:
        if _CERTIFICATE in (text := os.environ.get(name, "")):
            os.environ[name] = _written(f"{text}\n")
    folder = os.environ.get(CA_VARIABLE, "")
    # a mounted ConfigMap also holds `..data` and the like, which are no certificates
    found = sorted(path for path in Path(folder).glob("[!.]*") if path.suffix in CA_SUFFIXES) if folder else []
    wanted = [name for name in TRUSTED if not os.environ.get(name)] if found else []
    bundle = os.environ.get(BUNDLE_VARIABLE, "")
    if not wanted and not bundle:
        return
    from botocore.httpsession import where

    text = "\n".join([Path(where()).read_text(encoding="utf-8"), *map(_certificates, found)])
    # without a certificate of the site too: who is told of the file shall find it
    os.environ.update(dict.fromkeys(wanted, _written(text, bundle)))


def _written(certificates: str, path: str = "") -> str:
    """The file that holds them: at `path`, or one of its own."""
    if not path:
        handle, path = tempfile.mkstemp(suffix=".pem", dir=_folder())
        os.close(handle)
    Path(path).write_text(certificates, encoding="utf-8")
    return path


@cache
def _folder() -> str:
    """Of this process's own, gone at its end."""
    from zhllama.storage.private import temporary_folder

    held = ExitStack()
    atexit.register(held.close)
    return held.enter_context(temporary_folder())


def _certificates(path: Path) -> str:
    mend = "put certificates in PEM there"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: it cannot be read ({error}); {mend}") from error
    if _CERTIFICATE not in text:
        raise InputError(f"{path}: it holds no certificate; {mend}")
    return text
