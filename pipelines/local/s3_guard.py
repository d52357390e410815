"""What keeps others away from the parts of the local S3 server.

SeaweedFS is five servers that speak with each other, on ports of loopback where every user of the machine and every web
page reaches them, and only the S3 one asks for keys. So the others are closed: gRPC takes nobody without this start's
certificate, the volume server nobody without a token signed with this start's key, the master and the filer answer no
HTTP at all (-disableHttp), no page of another origin reads an answer. What is left open to all says that the server is
there, its version and the room on its disk. All of it is made anew at each start, readable by its owner alone.
"""

import os
import secrets
import socket
import stat
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from zhllama.storage.private import write_private

CERTIFICATE, SETTINGS = "internal.pem", "security.toml"
_JWT = ("jwt.signing", "jwt.signing.read", "jwt.filer_signing", "jwt.filer_signing.read")
_GRPC = ("master", "volume", "filer", "s3", "admin", "worker", "msg_broker", "msg_agent", "client")
_HTTPS = ("master", "filer", "admin")
NO_ORIGIN = "https://none.invalid"
OPTIONS = ("-disableHttp", f"-s3.allowedOrigins={NO_ORIGIN}", f"-filer.allowedOrigins={NO_ORIGIN}")


def write_settings(folder: Path) -> None:
    """The settings of one start, for a server that runs in this folder."""
    write_private(folder / CERTIFICATE, _certificate())
    parts = [f'[{name}]\nkey = "{secrets.token_hex(32)}"\nexpires_after_seconds = 10' for name in _JWT]
    # one pair of all parts: both who is let in, and who lets in
    parts += [f'[grpc]\nca = "{CERTIFICATE}"']
    parts += [f'[grpc.{name}]\ncert = "{CERTIFICATE}"\nkey = "{CERTIFICATE}"' for name in _GRPC]
    parts += [f'[https.{name}]\ncert = "{CERTIFICATE}"\nkey = "{CERTIFICATE}"\nca = "{CERTIFICATE}"' for name in _HTTPS]
    parts += [f'[cors.allowed_origins]\nvalues = "{NO_ORIGIN}"', "[access]\nui = false"]
    write_private(folder / SETTINGS, "\n".join(parts).encode())


def _certificate() -> bytes:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "zhllama")])
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(x509.random_serial_number()).add_extension(x509.BasicConstraints(True, None), True)
    # it lives as long as the server; a clock that is set right meanwhile must not end it
    made = made.not_valid_before(now - timedelta(days=3650)).not_valid_after(now + timedelta(days=3650))
    kinds = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return made.sign(key, hashes.SHA256()).public_bytes(kinds[0]) + key.private_bytes(*kinds)


def remove_sockets(ports: list[int]) -> None:
    """SeaweedFS listens on sockets in /tmp too, whatever TMPDIR says, and leaves them when it is killed."""
    for port in ports:
        for path in Path("/tmp").glob(f"seaweedfs-*-{int(port)}.sock"):
            with suppress(OSError):
                # another's, who has the port by now
                if not _listens(path):
                    path.unlink()


STALE = 3600
"""Seconds after which a socket that nobody listens on is no server's that only starts."""


def remove_stale_sockets() -> None:
    """Likewise of servers that were killed and whose folders nobody has started again: what is this user's, and
    refuses connections."""
    for path in Path("/tmp").glob("seaweedfs-*.sock"):
        with suppress(OSError):
            found = path.lstat()
            ours = stat.S_ISSOCK(found.st_mode) and found.st_uid == os.geteuid()
            if ours and time.time() - found.st_mtime > STALE and not _listens(path):
                path.unlink()


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        client.setblocking(False)
        try:
            client.connect(str(path))
        except ConnectionRefusedError:
            return False
        except OSError:
            return True
    return True
