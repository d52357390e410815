"""A unix socket for an engine's server that knows hosts and ports alone: nobody but its gateway reaches it.

On loopback an engine answers every user of the machine and, with the CORS headers that llama.cpp's server sends, every
page of a browser here. A socket lies in a folder that is its owner's, and no page can name it.
"""

import sys

UDS = "--uds"


def listen_on_socket() -> None:
    """Takes `--uds PATH` off the command line; what uvicorn serves in this process it serves there."""
    import uvicorn

    at = sys.argv.index(UDS)
    path = sys.argv[at + 1]
    del sys.argv[at : at + 2]
    configure = uvicorn.Config.__init__

    def on_socket(self: uvicorn.Config, *args: object, **options: object) -> None:
        configure(self, *args, **{**options, "uds": path, "host": "127.0.0.1", "port": 0})  # type: ignore[arg-type]

    uvicorn.Config.__init__ = on_socket  # type: ignore[method-assign]
