"""A process that registers with a sentinel, by the standard library alone: it starts in a moment.

Its argument is JSON: `socket`, `process_id`, `incarnation`, and `pidfd_of` or `pipe`. It prints the
answer and then does what it reads: `leave`, `cut`, `exec`, `exit`, `again`.
"""

import contextlib
import json
import os
import socket
import sys
from typing import Any


def register(about: dict[str, Any]) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(about["socket"])
    line = {
        "process_id": about["process_id"],
        "incarnation": about["incarnation"],
        "kind": "pipe" if about.get("pipe") else "pidfd",
    }
    if about.get("pipe"):
        passed, about["kept"] = os.pipe()
    else:
        passed = os.pidfd_open(about.get("pidfd_of") or os.getpid())
    with contextlib.suppress(BrokenPipeError):  # refused already
        socket.send_fds(connection, [json.dumps(line).encode() + b"\n"], [passed])
    os.close(passed)
    print(connection.recv(4096).decode().strip(), flush=True)
    return connection


def main(about: dict[str, Any]) -> None:
    connection = register(about)
    for line in sys.stdin:
        word = line.strip()
        if word == "leave":
            connection.sendall(b'{"leaving": true}\n')
            connection.recv(1)
            break
        if word == "leave in haste":
            connection.sendall(b'{"leaving": true}\n')
            os._exit(0)
        if word == "cut":
            connection.close()
        if word == "again":
            connection = register(about)
        if word == "exec":
            code = "print(0, flush=True); input()"
            os.execv(sys.executable, [sys.executable, "-c", code])  # noqa: S606 - our own
        if word == "exit":
            sys.exit(3)
        print(word, flush=True)


main(json.loads(sys.argv[1]))
