"""The floor of a round with a large model: the bytes alone, down and up for some clients, over TLS 1.3 sockets.

A thread a client at the server, a process a client; each side hashes what comes in with SHA-256, as both of ours do.
Nothing is stored, trained or averaged, and no HTTP is spoken.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from contenders.flower_certificates import AUTHORITY, CERTIFICATE, HOST, KEY, write_certificates

CHUNK = 1 << 20
_SPAWN = multiprocessing.get_context("spawn")


def rounds(folder: Path, size: int, number: int, clients: int = 2) -> list[float]:
    """Seconds of each of `number` rounds of `size` bytes down to each client and up again; `folder` is a new one."""
    folder.mkdir(parents=True)
    write_certificates(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(folder / CERTIFICATE, folder / KEY)
    content = memoryview(bytearray(size))
    with socket.create_server((HOST, 0)) as listening, ThreadPoolExecutor(clients) as pool:
        port = listening.getsockname()[1]
        workers = [
            _SPAWN.Process(target=_client, args=(folder, port, size, number), daemon=True)
            for _ in range(clients)
        ]
        for worker in workers:
            worker.start()
        peers = [context.wrap_socket(listening.accept()[0], server_side=True) for _ in workers]
        seconds = []
        for _ in range(number):
            began = time.perf_counter()
            list(pool.map(lambda peer: _serve(peer, content), peers))
            seconds.append(time.perf_counter() - began)
        for peer, worker in zip(peers, workers, strict=True):
            peer.close()
            worker.join(30)
    return seconds


def _serve(peer: ssl.SSLSocket, content: memoryview) -> None:
    _send(peer, content)
    _receive(peer, len(content))


def _client(folder: Path, port: int, size: int, number: int) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(folder / AUTHORITY)
    content = memoryview(bytearray(size))
    with context.wrap_socket(socket.create_connection((HOST, port)), server_hostname=HOST) as server:
        for _ in range(number):
            _receive(server, size)
            _send(server, content)


def _send(peer: ssl.SSLSocket, content: memoryview) -> None:
    for place in range(0, len(content), CHUNK):
        peer.sendall(content[place : place + CHUNK])


def _receive(peer: ssl.SSLSocket, size: int) -> None:
    sha, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK))
    while size:
        count = peer.recv_into(buffer, min(CHUNK, size))
        if not count:
            raise ConnectionError("the peer has gone")
        sha.update(buffer[:count])
        size -= count
