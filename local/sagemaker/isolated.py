"""Gives a server that has no network one door: a Unix socket, forwarded to its port on the loopback of its own
network namespace, in which this is started.

    python isolated.py <socket> <port> <command> [argument ...]

The command takes this process's place; the forwarder is its child, in the same session, and ends with it.
"""

import fcntl
import os
import signal
import socket
import struct
import sys
import threading

SIOCSIFFLAGS = 0x8914
IFF_UP_AND_RUNNING = 0x1 | 0x40


def bring_up_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        fcntl.ioctl(handle, SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", IFF_UP_AND_RUNNING))


def pump(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(1 << 18):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        # One side is gone: the other is told by the shutdown below.
        for end in (source, target):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


def forward(outside: socket.socket, port: int) -> None:
    with outside:
        try:
            inside = socket.create_connection(("127.0.0.1", port))
        except OSError:
            return  # Not yet, or no longer: the caller sees its connection end.
        with inside:
            answers = threading.Thread(target=pump, args=(inside, outside), daemon=True)
            answers.start()
            pump(outside, inside)
            answers.join()


def main(path: str, port: int, command: list[str]) -> None:
    bring_up_loopback()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(128)
    if os.fork() != 0:
        listener.close()
        os.execvp(command[0], command)
    # A server that is told to stop finishes what it has; until then its door stays open.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        outside, _ = listener.accept()
        threading.Thread(target=forward, args=(outside, port), daemon=True).start()


main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
