"""What a client may cost the agents' server: a key first, then so many bytes, so many seconds, so many connections."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

import pytest

from rollout.external import connection
from rollout.external.connection import MAX_BODY
from rollout.external.endpoint import Endpoint
from rollout.external.openai_format import MAX_DEPTH
from rollout.external.session import Session

Socket = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Open = Callable[[], Awaitable[Socket]]
FLOOD = 61 << 20


def with_endpoint(scene: Callable[[Open, Session], Awaitable[None]]) -> None:
    async def run() -> None:
        endpoint = Endpoint()
        where = urlsplit(endpoint.base_url)
        writers = []

        async def connect() -> Socket:
            reader, writer = await asyncio.open_connection(where.hostname, where.port)
            writers.append(writer)
            return reader, writer

        try:
            async with asyncio.timeout(60):
                await scene(connect, endpoint.open())
        finally:
            for writer in writers:
                writer.transport.abort()
            await endpoint.close()

    asyncio.run(run())


def head(length: int | None, key: str = "wrong") -> bytes:
    size = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
    return f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n{size}\r\n\r\n".encode()


async def flooded(connect: Open, opening: bytes, piece: bytes = b"[" * 65536) -> tuple[int, int]:
    """The status answered, and bytes sent until then; sends until it is answered or cut."""
    reader, writer = await connect()
    writer.write(opening)
    answer = asyncio.create_task(reader.readline())
    sent = 0
    while sent < FLOOD and not answer.done():
        writer.write(piece)
        sent += len(piece)
        try:
            await asyncio.wait_for(writer.drain(), 0.2)
        except (TimeoutError, ConnectionError):
            break  # the server reads no more
        await asyncio.sleep(0)
    return int((await answer).split()[1]), sent


def test_without_a_key_the_body_is_not_read() -> None:
    async def scene(connect: Open, session: Session) -> None:
        status, sent = await flooded(connect, head(FLOOD))
        assert status == 401
        assert sent < FLOOD // 4, "what lies in buffers"

    with_endpoint(scene)


@pytest.mark.parametrize("told", [True, False], ids=["told", "chunked"])
def test_a_body_has_a_limit_whether_its_length_is_told_or_not(told: bool) -> None:
    async def scene(connect: Open, session: Session) -> None:
        piece = b"[" * 65536 if told else b"10000\r\n" + b"[" * 65536 + b"\r\n"
        status, sent = await flooded(connect, head(FLOOD if told else None, session.key), piece)
        assert status == 413
        assert sent < MAX_BODY + (16 << 20)

    with_endpoint(scene)


@pytest.mark.parametrize("deep", [MAX_DEPTH + 1, 900, 100_000])
@pytest.mark.parametrize("where", ["body", "tools", "arguments"])
def test_what_is_nested_too_deep_is_refused_or_left_as_text(where: str, deep: int) -> None:
    nested = "[" * deep + "]" * deep
    message = '{"role": "user", "content": "hi"}'
    body = {
        "body": nested,
        "tools": f'{{"messages": [{message}], "tools": {nested}}}',
        "arguments": json.dumps(
            {
                "messages": [
                    {"role": "user", "content": "hi"},
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {"id": "1", "type": "function", "function": {"name": "f", "arguments": nested}}
                        ],
                    },
                ],
                "n": 2,
            }
        ),
    }[where].encode()

    async def scene(connect: Open, session: Session) -> None:
        reader, writer = await connect()
        writer.write(head(len(body), session.key) + body)
        assert b" 400 " in await reader.readline()

    with_endpoint(scene)


def test_who_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(connection, "BODY_TIMEOUT_SECONDS", 0.2)

    async def scene(connect: Open, session: Session) -> None:
        silent, half, slow = [await connect() for _ in range(3)]
        half[1].write(head(10)[:30])
        slow[1].write(head(10, session.key) + b"{")
        for reader, _ in (silent, half):
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await reader.readexactly(1)
        assert b" 408 " in await slow[0].readline()

    with_endpoint(scene)


def test_the_oldest_silent_connection_makes_room_for_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "max_connections", lambda: 3)

    async def scene(connect: Open, session: Session) -> None:
        asking = await connect()
        asking[1].write(
            f"GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {session.key}\r\n\r\n".encode()
        )
        assert b" 200 " in await asking[0].readline()
        silent = [await connect() for _ in range(5)]
        for reader, _ in silent[:3]:
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await reader.readexactly(1)
        silent[4][1].write(head(0))
        assert b" 401 " in await silent[4][0].readline()
        asking[1].write(
            f"GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {session.key}\r\n\r\n".encode()
        )
        await asking[0].readuntil(b" 200 ")

    with_endpoint(scene)
