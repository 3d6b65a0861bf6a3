"""An HTTP/1.1 proxy in front of an S3 endpoint that does to requests what a bad day does.

It passes Host and every signed header on as they came, so that signatures stay valid, and holds each request and reply
whole, so that a fault is exactly the one that was asked for. Which requests meet a fault depends on the seed and on the
request alone, not on the order in which threads come by.
"""

import asyncio
import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Self
from urllib.parse import urlsplit

Kind = Literal["throttle", "reset", "truncate", "flip", "lose", "hang"]
SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)
LONGEST_HEAD = 1 << 20
RESET = struct.pack("ii", 1, 0)  # SO_LINGER that makes closing a reset


@dataclass(frozen=True)
class Fault:
    """What happens to a share of the requests whose "METHOD /path?query" matches.

    throttle: answered 503 SlowDown and not carried out; reset: the connection is reset instead; hang: no answer, ever;
    truncate: carried out, and the reply ends too early; flip: carried out, and one bit of the reply's body is wrong;
    lose: carried out, and the connection is reset in place of a reply.
    """

    kind: Kind
    rate: float = 1.0
    match: str = ""
    times: int | None = None  # at most; None for as often as the rate says


class FaultProxy:
    """The proxy, in a thread of its own, for as long as its block lasts. `injected` counts the faults by kind."""

    def __init__(self, upstream: str, faults: Iterable[Fault] = (), seed: int = 0):
        self.upstream = urlsplit(upstream)
        self.faults = list(faults)
        self.seed = seed
        self.requests = 0
        self.injected: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()  # of each request line
        self.used: Counter[Fault] = Counter()
        self.connections: set[asyncio.Task[None]] = set()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.url = ""

    def __enter__(self) -> Self:
        self.thread.start()
        server = asyncio.run_coroutine_threadsafe(self.listen(), self.loop).result()
        self.url = "http://{}:{}".format(*server.sockets[0].getsockname())
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self.close(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    async def listen(self) -> asyncio.Server:
        self.server = await asyncio.start_server(self.connected, "127.0.0.1", 0, limit=LONGEST_HEAD, backlog=512)
        return self.server

    async def close(self) -> None:
        self.server.close()
        for task in self.connections:
            task.cancel()
        await asyncio.gather(*self.connections, return_exceptions=True)

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client, request after request, until either side has enough."""
        task = asyncio.current_task()
        assert task
        self.connections.add(task)
        try:
            while await self.exchange(reader, writer):
                pass
        except (asyncio.IncompleteReadError, OSError):  # the client has gone, or the server
            pass
        except asyncio.CancelledError:  # the block has ended
            pass
        finally:
            self.connections.discard(task)
            writer.close()

    async def exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and what becomes of it; whether the connection goes on."""
        head = await reader.readuntil(b"\r\n\r\n")
        if header(head, b"expect"):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await read_body(reader, head)
        line = head.partition(b"\r\n")[0].decode("latin-1").rpartition(" ")[0]
        self.requests += 1
        kind, chance = self.choose(line)
        if kind == "hang":
            self.injected[kind] += 1
            await asyncio.Event().wait()
        if kind == "reset":
            return self.reset(writer, kind)
        if kind == "throttle":
            self.injected[kind] += 1
            length = b"Content-Length: %d\r\n\r\n" % len(SLOW_DOWN)
            writer.write(b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\n" + length)
            writer.write(b"" if line.startswith("HEAD ") else SLOW_DOWN)
            await writer.drain()
            return True
        reply_head, reply_body = await self.forward(head, body)
        if kind == "lose":
            return self.reset(writer, kind)
        if kind == "truncate":
            whole = reply_head + reply_body
            writer.write(whole[: chance.randrange(1, len(whole))])
            self.injected[kind] += 1
            await writer.drain()
            return False
        if kind == "flip" and reply_body:
            place = chance.randrange(len(reply_body))
            wrong = reply_body[place] ^ 1 << chance.randrange(8)
            reply_body = reply_body[:place] + bytes([wrong]) + reply_body[place + 1 :]
            self.injected[kind] += 1
        writer.write(reply_head + reply_body)
        await writer.drain()
        return kind != "flip" and header(head, b"connection").lower() != b"close"

    def choose(self, line: str) -> tuple[Kind | None, random.Random]:
        """The fault that this request meets, if any, and the chance that decides its details."""
        self.seen[line] += 1
        chance = random.Random(f"{self.seed} {self.seen[line]} {line}")
        for fault in self.faults:
            if re.search(fault.match, line) and chance.random() < fault.rate and self.used[fault] != fault.times:
                self.used[fault] += 1
                return fault.kind, chance
        return None, chance

    def reset(self, writer: asyncio.StreamWriter, kind: Kind) -> bool:
        self.injected[kind] += 1
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        writer.transport.abort()
        return False

    async def forward(self, head: bytes, body: bytes) -> tuple[bytes, bytes]:
        """Have the server carry a request out, on a connection of its own; the reply's head and body."""
        reader, writer = await asyncio.open_connection(
            self.upstream.hostname, self.upstream.port, limit=max(LONGEST_HEAD, len(body))
        )
        try:
            writer.write(with_connection(head, b"close") + body)
            await writer.drain()
            while (reply := await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 1"):
                pass  # 100 Continue, which the client has had from us
            rest = await reader.read()
            if not header(reply, b"content-length") and not header(reply, b"transfer-encoding"):
                reply = reply[:-2] + b"Content-Length: %d\r\n\r\n" % len(rest)
            return with_connection(reply, None), rest
        finally:
            writer.close()


async def read_body(reader: asyncio.StreamReader, head: bytes) -> bytes:
    """A request's body as it was sent."""
    if header(head, b"transfer-encoding").lower() != b"chunked":
        return await reader.readexactly(int(header(head, b"content-length") or 0))
    chunks = []
    while True:
        size = await reader.readuntil(b"\r\n")
        chunk = await reader.readexactly(int(size.partition(b";")[0], 16) + 2)
        chunks += [size, chunk]
        if len(chunk) == 2:  # the last one; trailers are not used with S3
            return b"".join(chunks)


def header(head: bytes, name: bytes) -> bytes:
    """A header's value, or nothing."""
    found = re.search(rb"\r\n" + name + rb":[ \t]*([^\r]*?)[ \t]*\r\n", head, re.IGNORECASE)
    return found[1] if found else b""


def with_connection(head: bytes, value: bytes | None) -> bytes:
    """The same head with another Connection header, which belongs to one leg of the way only and is never signed."""
    without = re.sub(rb"\r\n(connection|keep-alive):[^\r]*", b"", head, flags=re.IGNORECASE)
    return without if value is None else without[:-2] + b"Connection: " + value + b"\r\n\r\n"
