"""A way to a pod's port through the API server, for a command that does not run in the cluster: `kubectl port-forward`,
by the kubernetes client. Each connection to the loopback address is a forwarded one of its own."""

import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from kubernetes import client
from kubernetes.client.exceptions import ApiException
from kubernetes.stream import portforward, ws_client
from websocket import WebSocketBadStatusException

from zhllama.kubernetes.api import short

log = logging.getLogger("deploy")


class _Way(ws_client.PortForward):
    """The library's, whose thread dies of a connection that breaks, with a traceback, and leaves its ends open."""

    def _proxy(self) -> None:
        try:
            super()._proxy()
        except Exception as error:  # noqa: BLE001 - whatever it is, the way is at its end
            log.debug("a forwarded connection broke: %s", error)
        finally:
            for port in self.local_ports.values():
                port.python.close()
            with suppress(Exception):
                self.websocket.close()


# what its portforward() makes cannot be chosen otherwise
ws_client.PortForward = _Way


@contextmanager
def forwarded(namespace: str, pod: str, port: int) -> Iterator[str]:
    """`http://127.0.0.1:43210`, as long as the block runs. What cannot be forwarded is a connection that closes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_accept, args=(listener, namespace, pod, port), daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def _accept(listener: socket.socket, namespace: str, pod: str, port: int) -> None:
    said = ""
    while True:
        try:
            near, _ = listener.accept()
        except OSError:
            # the block has ended
            return
        try:
            # a client of its own: to forward, the library puts another transport into the one it is given
            api = client.CoreV1Api(client.ApiClient())
            way = portforward(api.connect_get_namespaced_pod_portforward, pod, namespace, ports=str(port))
            far = way.socket(port)
            far.setblocking(True)
        except Exception as error:  # noqa: BLE001 - the library raises many kinds, and a thread has nobody to hear it
            if refusal(error) != said:
                said = refusal(error)
                log.warning("pod %s/%s cannot be reached through the API server: %s", namespace, pod, said)
            near.close()
            continue
        for source, target in ((near, far), (far, near)):
            threading.Thread(target=_carry, args=(source, target), daemon=True).start()


def refusal(error: Exception) -> str:
    """Why a way was not opened, in one line: of a refused handshake its status and the server's own words. The client
    hides them in a text with all of the answer's headers."""
    handshake = error.__context__
    if isinstance(handshake, WebSocketBadStatusException):
        refused = ApiException(status=handshake.status_code, reason=handshake.status_message)
        refused.body = (handshake.resp_body or b"").decode("utf-8", "replace")
        error = refused
    return " ".join(short(error).split())


def _carry(source: socket.socket, target: socket.socket) -> None:
    """Bytes from one to the other, until one side ends; then both are closed."""
    with suppress(OSError):
        while content := source.recv(65536):
            target.sendall(content)
    for side in (source, target):
        with suppress(OSError):
            side.shutdown(socket.SHUT_RDWR)
        with suppress(OSError):
            side.close()
