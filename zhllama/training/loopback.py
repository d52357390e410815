"""Processes of one machine find each other on loopback alone.

torch's store listens on every address of the machine, believes everybody, and what the elastic launcher reads from it
is a pickle: whoever reaches the port runs code here. Of processes that all are on this machine it listens on loopback,
and the launcher's own state lies in a file of ours (other users of the machine reach loopback).
"""

import os
import socket
from importlib import import_module
from typing import Any

_NAMES = ("localhost", "127.0.0.1", "::1")
_USERS = (
    "torch.distributed", "torch.distributed.rendezvous",
    "torch.distributed.elastic.rendezvous.c10d_rendezvous_backend",
    "torch.distributed.elastic.rendezvous.static_tcp_rendezvous",
)  # fmt: skip
"""Where torch keeps its store by name."""


def listen_on_loopback_alone() -> None:
    """For this process, from now on: stores that it serves at a name of this machine, and gloo's connections."""
    from torch.distributed import TCPStore

    if issubclass(TCPStore, _Marked):
        return

    class LoopbackStore(_Marked, TCPStore):
        def __init__(self, host_name: str, port: int, *given: Any, **named: Any) -> None:
            # by place they are: host_name, port, world_size, is_master
            serves = named.get("is_master", given[1] if len(given) > 1 else False)
            if serves and host_name in _NAMES and (listener := _listener(port)) is not None:
                port, named["master_listen_fd"] = listener.getsockname()[1], listener.detach()
            super().__init__(host_name, port, *given, **named)

    for name in _USERS:
        import_module(name).TCPStore = LoopbackStore  # type: ignore[attr-defined]
    for _, name in socket.if_nameindex():
        if name in ("lo", "lo0"):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


class _Marked:
    """Of the store that listens on loopback."""


def _listener(port: int) -> socket.socket | None:
    """None where the port is taken: this process may serve it already, and else torch says what is wrong."""
    made = socket.socket()
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(("127.0.0.1", port))
        made.listen(1024)
    except OSError:
        made.close()
        return None
    return made
