"""One request as it came: parsed once, checked field by field, handed on as it is unless a guard changes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import msgspec

from millhand.errors import suggestion
from millhand.serving.openai.failure import Failure
from millhand.serving.openai.fields import ASKS_NOTHING, CHAT, COMPLETIONS, EMBEDDINGS, TEXTS_CAP, Field

Endpoint = Literal["chat", "completions", "embeddings"]
ROLES = ("system", "developer", "user", "assistant", "tool")
SYSTEM = ("system", "developer")
FIELDS: Mapping[Endpoint, Mapping[str, Field]] = {
    "chat": CHAT,
    "completions": COMPLETIONS,
    "embeddings": EMBEDDINGS,
}
_DECODER = msgspec.json.Decoder()
_USAGE = b',"stream_options":{"include_usage":true}}'


class Asked:
    """A request for one of the three endpoints."""

    def __init__(self, endpoint: Endpoint, body: bytes) -> None:
        """Raises Failure (400) naming the field."""
        self.endpoint = endpoint
        self.fields = _object(body)
        self._body: bytes | None = body
        self._check()
        self.model: str = self.fields["model"]
        self.stream: bool = bool(self.fields.get("stream"))
        self.wants_usage: bool = bool((self.fields.get("stream_options") or {}).get("include_usage"))

    @property
    def max_tokens(self) -> int:
        """What the client asks for at most; 0 where it does not say."""
        return self.fields.get("max_completion_tokens") or self.fields.get("max_tokens") or 0

    @property
    def tools(self) -> tuple[str, ...]:
        """Names of the tools that the model is offered."""
        return tuple(tool["function"]["name"] for tool in self.fields.get("tools") or ())

    @property
    def guided(self) -> bool:
        """Whether the answer is bound to a JSON schema."""
        return (self.fields.get("response_format") or {}).get("type") == "json_schema"

    def require(self, abilities: frozenset[str], context_tokens: int) -> None:
        """Raises Failure (400) for what such a server cannot do, or such a context cannot hold."""
        if self.endpoint not in abilities:
            raise Failure(
                400, f"model '{self.model}' does not serve {self.endpoint}", param="model", code="unsupported"
            )
        for name, value in self.fields.items():
            ability = FIELDS[self.endpoint][name].ability
            if ability is None or ability in abilities or value is None or value == ASKS_NOTHING.get(name):
                continue
            raise Failure(
                400,
                f"{name}: the server of model '{self.model}' cannot do this",
                hint=f"leave {name} out, or serve the model with one that can: [language] server",
                param=name,
                code="unsupported",
            )
        if context_tokens and self.max_tokens > context_tokens:
            name = "max_completion_tokens" if self.fields.get("max_completion_tokens") else "max_tokens"
            raise Failure(
                400,
                f"{name} = {self.max_tokens} is more than the {context_tokens} tokens that model '{self.model}' holds",
                hint="ask for less, or leave it out",
                param=name,
            )

    # ---- texts ------------------------------------------------------------------------------------------------------

    def system(self) -> list[str]:
        """The texts of the system prompt."""
        return [text for message in self._messages() if message["role"] in SYSTEM for _, text in _texts(message)]

    def set_system(self, prompt: str) -> None:
        """Put one system prompt in the place of what there is; before the text of a plain completion."""
        if self.endpoint == "completions":
            text = f"{prompt}\n\n{self.fields['prompt']}" if prompt else self.fields["prompt"]
            self.fields["prompt"] = text
        else:
            others = [message for message in self.fields["messages"] if message["role"] not in SYSTEM]
            first = [{"role": "system", "content": prompt}] if prompt else []
            self.fields["messages"] = [*first, *others]
        self._body = None

    def inputs(self) -> Iterator[tuple[str, str, Any, Any]]:
        """(role, text, where it stands: a table or list and its key) of every text but the system prompt's."""
        if self.endpoint == "completions":
            yield "user", self.fields["prompt"], self.fields, "prompt"
        elif self.endpoint == "embeddings":
            value = self.fields["input"]
            if isinstance(value, str):
                yield "user", value, self.fields, "input"
            else:
                yield from (("user", text, value, place) for place, text in enumerate(value))
        for message in self._messages():
            if message["role"] not in SYSTEM:
                for holder, text in _texts(message):
                    yield message["role"], text, holder, "content" if holder is message else "text"

    def change(self, holder: Any, key: Any, text: str) -> None:
        """Put another text where `inputs` found one."""
        holder[key] = text
        self._body = None

    def exchange(self, old: str, new: str) -> None:
        """Put another text wherever this one stands."""
        for _, text, holder, key in list(self.inputs()):
            if old and old in text:
                self.change(holder, key, text.replace(old, new))

    def own(self) -> Mapping[str, Any]:
        """Take the field `millhand` out: what the agent's own requests say beside OpenAI's."""
        found: Mapping[str, Any] = self.fields.pop("millhand", None) or {}
        if found:
            self._body = None
        return found

    def body(self, with_usage: bool, as_read: bool) -> bytes:
        """What the server gets: the bytes that came, where nothing had to change.

        `with_usage`: a stream must end with its usage, which the client need not have asked for. `as_read`: guards have
        read it, so the server gets what they read and no other meaning of the same bytes, such as a key that stands
        there twice.
        """
        with_usage = with_usage and self.stream and not self.wants_usage
        if self._body is None or as_read or (with_usage and "stream_options" in self.fields):
            options = {"stream_options": {"include_usage": True}} if with_usage else {}
            return msgspec.json.encode({**self.fields, **options})
        return self._body.rstrip()[:-1] + _USAGE if with_usage else self._body

    def _messages(self) -> list[dict[str, Any]]:
        return self.fields["messages"] if self.endpoint == "chat" else []

    # ---- checks -----------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        known = FIELDS[self.endpoint]
        for name, value in self.fields.items():
            if name not in known:
                raise Failure(
                    400, f"field '{name}' is not known{suggestion(name, known)}", param=name, code="unknown_field"
                )
            if value is not None and (fault := known[name].check(value)):
                raise Failure(400, f"{name} {fault}", param=name)
        if not self.fields.get("model"):
            raise _missing("model", "GET /v1/models lists what is served")
        if self.endpoint == "chat":
            _check_messages(self.fields.get("messages"))
        elif self.endpoint == "completions" and not isinstance(self.fields.get("prompt"), str):
            raise Failure(400, "prompt must be one text", hint="send a request for each", param="prompt")
        elif self.endpoint == "embeddings":
            _check_input(self.fields.get("input"))


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = _DECODER.decode(body)
    except msgspec.DecodeError as error:
        raise Failure(400, f"the body is not valid JSON: {error}", code="invalid_json") from error
    except UnicodeDecodeError as error:
        raise Failure(400, f"the body is not valid UTF-8: {error.reason}", code="invalid_json") from error
    except RecursionError as error:
        raise Failure(400, "the body is nested too deep", code="invalid_json") from error
    if not isinstance(found, dict):
        raise Failure(400, "the body must be a JSON object", code="invalid_json")
    return found


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise _missing("messages", "a list of at least one message")
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise Failure(400, f"{place} must be an object with a role: {', '.join(ROLES)}", param=place)
        content = message.get("content")
        if content is None and message["role"] == "assistant":
            continue
        if not isinstance(content, str | list):
            raise Failure(400, f"{place}: content must be a text or a list of parts", param=place)
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise Failure(400, f"{place}: a part of type {kind!r} is not served; text is", param=place)


def _check_input(value: Any) -> None:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise Failure(400, "input must be a text or a list of texts, none of them empty", param="input")
    if len(texts) > TEXTS_CAP:
        raise Failure(400, f"input has {len(texts)} texts; at most {TEXTS_CAP} can be asked at once", param="input")


def _missing(name: str, what: str) -> Failure:
    return Failure(400, f"{name} is missing", hint=what, param=name, code="missing_field")


def _texts(message: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """The texts of a message, with the table that holds each."""
    content = message.get("content")
    if isinstance(content, str):
        yield message, content
    else:
        yield from ((part, part["text"]) for part in content or ())
