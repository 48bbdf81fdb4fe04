"""Streams of events as servers really send them, cut anywhere, and what goes wrong in them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millhand.errors import LanguageError, RefusedError
from millhand.language.events import stream

OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


def event(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": {"content": text}}]}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
REFUSAL = b'{"error":{"message":"an override","code":"content_filter"}}'


@contextlib.asynccontextmanager
async def answering(pieces: Sequence[bytes], hold: bool = False) -> AsyncIterator[tuple[str, asyncio.Event]]:
    """A server that answers one request with these pieces; `left` is set when the client has gone."""
    left = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        if hold:
            with contextlib.suppress(ConnectionError):
                while await reader.read(1 << 16):
                    pass
            left.set()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/chat/completions", left


async def texts(url: str, idle_s: float = 30) -> list[str]:
    return [chunk["choices"][0]["delta"]["content"] async for chunk in stream(url, {"stream": True}, {}, idle_s)]


@settings(max_examples=20, deadline=None)
@given(said=st.lists(st.text(min_size=1, max_size=20), max_size=5), cut=st.integers(1, 40))
def test_an_answer_cut_anywhere_is_the_same(said, cut):
    body = OK + b": a comment\n\n" + b"".join(map(event, said)) + DONE

    async def ask():
        async with answering([body[at : at + cut] for at in range(0, len(body), cut)]) as (url, _):
            return await texts(url)

    assert asyncio.run(ask()) == said


@pytest.mark.parametrize(
    ("pieces", "raised", "message"),
    [
        ([OK, event("a")], LanguageError, "broke off within its answer"),
        ([], LanguageError, "broke off within its answer"),
        ([b"SSH-2.0-OpenSSH\r\n"], LanguageError, "the answer is not usable"),
        ([OK, b"data: {not json\n\n"], LanguageError, "no JSON object"),
        ([OK, b"data: 5\n\n"], LanguageError, "no JSON object"),
        ([OK, event("a"), b'data: {"error": {"message": "the server died", "code": "x"}}\n\n'], LanguageError, "died"),
        ([OK, b'data: {"error": {"message": "not so", "code": "content_filter"}}\n\n'], RefusedError, "not so"),
        (
            [b"HTTP/1.1 400 Bad Request\r\nContent-Length: 59\r\n\r\n", REFUSAL],
            RefusedError,
            "an override",
        ),
        ([b"HTTP/1.1 503 Busy\r\nContent-Length: 2\r\n\r\nhm"], LanguageError, "status 503"),
    ],
)  # fmt: skip
async def test_what_goes_wrong_is_said(pieces, raised, message):
    async with answering(pieces) as (url, _):
        with pytest.raises(raised, match=message):
            await texts(url)


async def test_an_endless_event_is_no_event():
    async with answering([OK, b"data: ", *[b"x" * (1 << 18)] * 5]) as (url, _):
        with pytest.raises(LanguageError, match="longer than"):
            await texts(url)


async def test_silence_ends():
    async with answering([OK, event("a")], hold=True) as (url, left):
        with pytest.raises(LanguageError, match=r"said nothing for 0\.2 s"):
            await texts(url, idle_s=0.2)
        await asyncio.wait_for(left.wait(), 30)


async def test_who_leaves_closes_the_connection():
    async with answering([OK, event("a"), event("b")], hold=True) as (url, left):
        async for _ in (chunks := stream(url, {}, {}, 30)):
            break
        await chunks.aclose()
        await asyncio.wait_for(left.wait(), 30)


async def test_nobody_there():
    async with answering([]) as (url, _):
        pass
    with pytest.raises(LanguageError, match="does not answer"):
        await texts(url)
