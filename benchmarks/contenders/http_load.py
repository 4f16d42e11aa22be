"""Load on an HTTPS server from a process of its own: the same request again and again over kept connections.

    python -m contenders.http_load PORT ROOT PATH TOKEN CONNECTIONS SECONDS < body

Each connection sends its next request when it has the answer to the one before. Prints one JSON line: seconds of each
request, and by status how many; `versions` by `model_version` of the answers.
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import sys
import time
from collections import Counter

_LENGTH = re.compile(rb"content-length: (\d+)", re.I)
_VERSION = re.compile(rb'"model_version":\s*"([^"]*)"')


async def connection(
    port: int, context: ssl.SSLContext, request: bytes, until: float, times: list[float], seen: Counter[str]
) -> None:
    """One connection until `until`."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    while (started := time.perf_counter()) < until:
        writer.write(request)
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = _LENGTH.search(head)
            assert length is not None
            body = await reader.readexactly(int(length[1]))
        except (asyncio.IncompleteReadError, OSError):
            seen["lost"] += 1
            return
        times.append(time.perf_counter() - started)
        seen[head[9:12].decode()] += 1
        version = _VERSION.search(body)
        if version is not None:
            seen["version " + version[1].decode()] += 1
    writer.close()


async def main(port: int, root: str, path: str, token: str, connections: int, seconds: float) -> None:
    """See the module."""
    body = sys.stdin.buffer.read()
    request = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    context = ssl.create_default_context(cafile=root)
    times: list[float] = []
    seen: Counter[str] = Counter()
    until = time.perf_counter() + seconds
    lines = [connection(port, context, request, until, times, seen) for _ in range(connections)]
    await asyncio.gather(*lines)
    print(json.dumps({"times": times, "seen": seen}))


if __name__ == "__main__":
    asyncio.run(
        main(int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]), float(sys.argv[6]))
    )
