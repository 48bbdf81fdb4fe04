"""An answer on its way from a language server to a client.

What comes goes out byte for byte. It is read along to count it, and written anew only where a guard changes or holds a
text, or where what a model thinks aloud must be told from its answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from millhand.serving.openai.failure import Failure
from millhand.serving.openai.guarding import GuardedStream, GuardSession, Refused
from millhand.serving.openai.thinking import Parts, Thinking, split

EVENT_BYTES_CAP = 8 << 20
DONE = b"data: [DONE]\n\n"
FILTERED = "content_filter"
"""Why an answer ends that a guard refuses, as OpenAI and Azure name it."""
THOUGHT, ANSWER = "reasoning_content", "content"


class Usage(msgspec.Struct):
    prompt_tokens: int | None = 0
    completion_tokens: int | None = 0


class Function(msgspec.Struct):
    arguments: str | None = None


class ToolCall(msgspec.Struct):
    index: int = 0
    function: Function | None = None


class Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    """As newer releases of vLLM name it."""
    tool_calls: list[ToolCall] | None = None


class Choice(msgspec.Struct):
    index: int = 0
    delta: Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class Event(msgspec.Struct):
    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None


_EVENT = msgspec.json.Decoder(Event)
_ANY = msgspec.json.Decoder(dict[str, Any])


class ChoiceTexts:
    """The texts of one choice: answer, thought, arguments of tools; each has its own way through the guards."""

    def __init__(self, thinking: Thinking | None, guarded: Callable[[], GuardedStream] | None) -> None:
        self._thinking = thinking
        self._guarded = guarded
        self._streams: dict[str, GuardedStream] = {}

    def feed(self, pieces: Mapping[str, str]) -> dict[str, str]:
        """Name of a text -> its next piece; returns what may go out now. Raises Refused."""
        if self._thinking is not None and ANSWER in pieces:
            pieces = {**pieces, **_named(self._thinking.feed(pieces[ANSWER]))}
        if self._guarded is None:
            return {name: text for name, text in pieces.items() if text}
        seen = {name: self._stream(name, self._guarded).feed(text) for name, text in pieces.items() if text}
        return {name: text for name, text in seen.items() if text}

    def finish(self) -> dict[str, str]:
        """What was held when the answer ended, and may go out. Raises Refused."""
        tail = self.feed(_named(self._thinking.finish())) if self._thinking is not None else {}
        for name, stream in self._streams.items():
            if held := stream.finish():
                tail[name] = tail.get(name, "") + held
        return tail

    def _stream(self, name: str, guarded: Callable[[], GuardedStream]) -> GuardedStream:
        if name not in self._streams:
            self._streams[name] = guarded()
        return self._streams[name]


class StreamRelay:
    """One streamed answer."""

    def __init__(
        self, *, wants_usage: bool, session: GuardSession | None, thinking: Callable[[], Thinking] | None, reads: bool
    ) -> None:
        """`session`: guards that must see the answer, if any. `thinking`: makes what tells thoughts from the answer.
        `reads`: whether texts may have to be written anew.
        """
        self._wants_usage = wants_usage
        self._session = session
        self._thinking = thinking
        self._reads = reads
        self._choices: dict[int, ChoiceTexts] = {}
        self._buffer = b""
        self.pieces = 0
        """Pieces of text that came, mostly a token each."""
        self.usage: Usage | None = None
        self.finish_reason = ""
        self.failure: Failure | None = None
        """Why the stream ended before its end."""
        self.ended = False

    def feed(self, data: bytes) -> bytes:
        """Take what the server sent; returns what goes to the client. Nothing more comes once `ended` is true."""
        buffer = self._buffer + data if self._buffer else data
        if b"\r" in buffer:
            buffer = buffer.replace(b"\r\n", b"\n")
        events = buffer.split(b"\n\n")
        self._buffer = events.pop()
        if len(self._buffer) > EVENT_BYTES_CAP:
            return self.fail(_broken("sent an event without an end"))
        written = b""
        for event in events:
            written += self._event(event)
            if self.ended:
                break
        return written

    def close(self) -> bytes:
        """The server has ended: what the client is told where that was too early."""
        return b"" if self.ended else self.fail(_broken("ended before its answer was whole"))

    def fail(self, failure: Failure) -> bytes:
        """End the stream with an error. Without `[DONE]`: nobody shall take it for a whole answer."""
        self.ended, self.failure = True, failure
        return failure.event

    def _event(self, event: bytes) -> bytes:
        if not event.startswith(b"data:"):
            return event + b"\n\n" if event.startswith(b":") else b""  # a comment that keeps the connection awake
        payload = event[5:].strip()
        if payload == b"[DONE]":
            self.ended = True
            return DONE
        try:
            return self._answered(event, payload, _EVENT.decode(payload))
        except (msgspec.DecodeError, UnicodeDecodeError):
            return self.fail(_broken("sent something that is no answer"))
        except Refused as refused:
            return self._refuse(payload, refused)

    def _answered(self, event: bytes, payload: bytes, parsed: Event) -> bytes:
        """An event with a piece of the answer. Raises Refused."""
        if parsed.error is not None:
            return self.fail(server_failure(500, parsed.error))
        if parsed.usage is not None:
            self.usage = parsed.usage
            if not parsed.choices and not self._wants_usage:
                return b""  # we asked for it, not the client
        return self._seen(event, payload, parsed)

    def _seen(self, event: bytes, payload: bytes, parsed: Event) -> bytes:
        """The event as it may go out. Raises Refused."""
        changed: dict[int, dict[str, str]] = {}
        pieces: dict[str, str] = {}
        for choice in parsed.choices:
            pieces = _pieces(choice)
            if pieces:
                self.pieces += 1
            if choice.finish_reason:
                self.finish_reason = choice.finish_reason
            if not self._reads:
                continue
            texts = self._texts(choice.index)
            out = texts.feed(pieces)
            for name, text in (texts.finish() if choice.finish_reason else {}).items():
                out[name] = out.get(name, "") + text
            renamed = choice.delta is not None and choice.delta.reasoning
            if renamed or out != pieces:
                changed[choice.index] = out
        if not changed:
            return event + b"\n\n"
        if len(parsed.choices) == 1 and (spliced := _spliced(payload, pieces, changed[parsed.choices[0].index])):
            return spliced
        return _rewritten(payload, changed)

    def _texts(self, index: int) -> ChoiceTexts:
        if index not in self._choices:
            thinking = self._thinking() if self._thinking is not None else None
            guarded = self._session.stream if self._session is not None else None
            self._choices[index] = ChoiceTexts(thinking, guarded)
        return self._choices[index]

    def _refuse(self, payload: bytes, refused: Refused) -> bytes:
        """The last event of an answer that a guard refuses: why, in `refusal`, and `finish_reason`."""
        answer = _ANY.decode(payload)
        chat = any("delta" in choice for choice in answer["choices"])
        texts = {"delta": {"refusal": refused.message}} if chat else {"text": ""}
        answer["choices"] = [{"index": 0, **texts, "logprobs": None, "finish_reason": FILTERED}]
        self.ended, self.finish_reason = True, FILTERED
        return b"data: " + msgspec.json.encode(answer) + b"\n\n" + DONE


async def whole_answer(body: bytes, session: GuardSession | None, thinks: bool, opened: bool) -> bytes:
    """A whole answer as it may go out: the bytes that came where nothing changed.

    `thinks`: the server may leave `<think>` in the answer; `opened`: as `Thinking` has it.
    """
    answer = _ANY.decode(body)
    changed = False
    for choice in answer.get("choices", []):
        before = msgspec.json.encode(choice)
        await _look(choice, session, thinks, opened)
        changed = changed or msgspec.json.encode(choice) != before
    return msgspec.json.encode(answer) if changed else body


async def _look(choice: dict[str, Any], session: GuardSession | None, thinks: bool, opened: bool) -> None:
    """Tell thought from answer in a choice, and have its texts guarded; one that is refused loses them."""
    message = choice.get("message")
    holder = choice if message is None else message
    if thinks and message is not None:
        if "reasoning" in message:
            message[THOUGHT] = message.pop("reasoning")
        if not message.get(THOUGHT) and message.get(ANSWER):
            parts = split(message[ANSWER], opened)
            if parts.thought:
                message[THOUGHT], message[ANSWER] = parts
    if session is None:
        return
    try:
        for name in ("text", ANSWER, THOUGHT):
            if holder.get(name):
                seen = await session.answer(holder[name])
                if seen != holder[name]:
                    holder[name], choice["logprobs"] = seen, None
        for call in holder.get("tool_calls") or ():
            call["function"]["arguments"] = await session.answer(call["function"].get("arguments") or "")
    except Refused as refused:
        choice.clear()
        texts = {"text": ""} if message is None else {"message": _refusal(refused)}
        choice.update({"index": 0, **texts, "logprobs": None, "finish_reason": FILTERED})


def _refusal(refused: Refused) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "refusal": refused.message}


def _pieces(choice: Choice) -> dict[str, str]:
    """Name of a text -> its piece in one event."""
    if choice.delta is None:
        return {"text": choice.text} if choice.text else {}
    delta = choice.delta
    thought = (delta.reasoning_content or "") + (delta.reasoning or "")
    pieces = {name: text for name, text in ((ANSWER, delta.content), (THOUGHT, thought)) if text}
    for call in delta.tool_calls or ():
        if call.function is not None and call.function.arguments:
            pieces[f"tool_calls.{call.index}"] = call.function.arguments
    return pieces


def _spliced(payload: bytes, pieces: Mapping[str, str], texts: Mapping[str, str]) -> bytes:
    """An event with its one text exchanged in place, which takes a fraction of reading and writing it anew.

    Empty where that cannot be: no text or another one, probabilities of tokens that are no more, other spellings.
    """
    if len(pieces) != 1 or texts.keys() != pieces.keys() or b'"logprobs":{' in payload:
        return b""
    ((name, text),) = pieces.items()
    was = b'"%s":%s' % (name.encode(), msgspec.json.encode(text))
    if payload.count(was) != 1:
        return b""
    return b"data: " + payload.replace(was, b'"%s":%s' % (name.encode(), msgspec.json.encode(texts[name]))) + b"\n\n"


def _rewritten(payload: bytes, changed: Mapping[int, Mapping[str, str]]) -> bytes:
    """An event with other texts in some of its choices; nothing where nothing is left in it."""
    answer = _ANY.decode(payload)
    left = bool(answer.get("usage"))
    for choice in answer["choices"]:
        texts = changed.get(choice.get("index", 0))
        if texts is not None:
            choice["logprobs"] = None
            _write(choice, texts)
        said = choice.get("text") or any(value for key, value in (choice.get("delta") or {}).items() if key != "role")
        left = left or bool(said or choice.get("finish_reason"))
    return b"data: " + msgspec.json.encode(answer) + b"\n\n" if left else b""


def _write(choice: dict[str, Any], texts: Mapping[str, str]) -> None:
    delta = choice.get("delta")
    if delta is None:
        choice["text"] = texts.get("text", "")
        return
    delta.pop("reasoning", None)
    for name in (ANSWER, THOUGHT):
        delta.pop(name, None)
        if texts.get(name):
            delta[name] = texts[name]
    calls = {f"tool_calls.{call.get('index', 0)}": call for call in delta.get("tool_calls") or ()}
    for name, call in calls.items():
        if "function" in call:
            call["function"]["arguments"] = texts.get(name, "")
    late = [name for name in texts if name.startswith("tool_calls.") and name not in calls]
    if late:
        delta["tool_calls"] = [
            *(delta.get("tool_calls") or ()),
            *({"index": int(name.partition(".")[2]), "function": {"arguments": texts[name]}} for name in late),
        ]


def _named(parts: Parts) -> dict[str, str]:
    return {THOUGHT: parts.thought, ANSWER: parts.answer}


def _broken(what: str) -> Failure:
    return Failure(
        502,
        f"the language server {what}",
        hint="send the request again",
        kind="server_error",
        code="server_failed",
        retry_after_s=1.0,
    )


def server_failure(status: int, error: Any) -> Failure:
    """What a client is told of an error that a language server gave; `error` is the server's own words."""
    words = error if isinstance(error, dict) else {}
    message = str(words.get("message") or error or f"status {status}")
    if words.get("type") == "exceed_context_size_error" or "maximum context length" in message:
        return Failure(
            400,
            message,
            hint="shorten the conversation, or ask for fewer tokens",
            param="messages",
            code="context_length_exceeded",
        )
    code = words.get("code")
    status = code if status == 500 and isinstance(code, int) and 400 <= code < 600 else status
    if 400 <= status < 500:
        param = words.get("param")
        return Failure(400, f"the language server refused: {message}", param=param if isinstance(param, str) else None)
    return Failure(
        503 if status == 503 else 502,
        f"the language server failed: {message}",
        hint="send the request again",
        kind="server_error",
        code="server_failed",
        retry_after_s=1.0,
    )
