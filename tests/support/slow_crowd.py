"""A program that opens many connections and sends each of them a byte now and then.

    python slow_crowd.py PORT COUNT SECONDS ADDRESS...

It connects from the addresses in turn, prints "open" once all are, then goes on for so many seconds, and prints how
many the server still keeps.
"""

from __future__ import annotations

import resource
import select
import socket
import sys
import time

HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500)
"""The start of a TLS handshake, longer than what is ever sent of it."""


def main(port: int, count: int, seconds: float, addresses: list[str]) -> None:
    """Be that crowd."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    crowd = [connected(port, addresses[number % len(addresses)]) for number in range(count)]
    print("open", flush=True)
    end, sent = time.monotonic() + seconds, 0
    while time.monotonic() < end and sent < len(HELLO):
        crowd = [one for one in crowd if dripped(one, HELLO[sent : sent + 1])]
        sent += 1
        time.sleep(0.1)
    print(len(crowd), flush=True)


def connected(port: int, address: str) -> socket.socket:
    """A connection from an address, whatever the server does with it."""
    connection = socket.socket()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.bind((address, 0))
    connection.setblocking(False)
    connection.connect_ex(("127.0.0.1", port))
    return connection


def dripped(connection: socket.socket, data: bytes) -> bool:
    """Send a byte; whether the server keeps the connection."""
    poller = select.poll()
    poller.register(connection, select.POLLRDHUP)
    gone = bool(poller.poll(0))
    if not gone:
        try:
            connection.send(data)
        except BlockingIOError:
            return True
        except OSError:
            gone = True
    if gone:
        connection.close()
    return not gone


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
