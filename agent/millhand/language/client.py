"""How the agent asks its language model: OpenAI's API, at the gateway or a server (`hookspecs.Complete`)."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from millhand.errors import DeadlineError, LanguageError, RefusedError
from millhand.language.events import stream
from millhand.language.exchange import Reply, exchange
from millhand.language.guarding import JUDGE_PATH, Part
from millhand.language.proving import answered, message_of

TIMEOUT_S = 120.0
SMALL_PARAMETERS = 1_000_000_000
"""A model with fewer weights chooses and phrases; it is not asked to write freely, or for several things at once."""
REFUSED = ("refused", "content_filter")
"""What the gateway calls a text that a guard refused: the error's code, or the choice's finish reason."""
TOKEN_BIAS = 40
"""On a candidate's tokens: more than any difference between the logits of those that the schema allows."""


class Place(NamedTuple):
    """Where to ask."""

    url: str
    """Without `/v1`."""
    headers: Mapping[str, str] = {}
    """Such as a token."""
    guarded: bool = False
    """Whether it is the gateway, which is told where parts of a prompt come from."""


class LanguageClient:
    """Implements `Complete`."""

    def __init__(
        self,
        place: Callable[[], Place],
        models: Callable[[], Sequence[Mapping[str, Any]]],
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """`place` is asked for each request and raises LanguageError where there is none; `models` is what
        `LanguageServers.routes` tells, the first is asked.
        """
        self._place = place
        self._models = models
        self._timeout_s = timeout_s

    @property
    def parameters(self) -> int:
        """Weights of the model; 0 where they are not known."""
        return int(self.model().get("parameters", 0))

    async def __call__(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        schema: Mapping[str, Any] | None = None,
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> str:
        """The answer's text without its thoughts; JSON by `schema` where one is given.

        Raises LanguageError where the server is gone, refuses the request or gives no usable answer, DeadlineError
        after the client's time, RefusedError where a guard said no.
        """
        asked: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
        if "seed" in self.model().get("abilities", ()):
            asked["seed"] = seed
        if schema is not None:
            asked["response_format"] = _format(schema)
        answer = await self._ask(messages, asked)
        text, _ = message_of(answer)
        if schema is not None:
            _require_json(text, answer)
        return text

    async def score(self, messages: Sequence[Mapping[str, str]], candidates: Sequence[str]) -> Sequence[float]:
        """How well each candidate fits as the answer, higher is better; in the candidates' order.

        Where the server has `logprobs` and `text_bias`: each candidate is written by the server, bound to it by a
        schema and led along its own tokens by a bias; its score is the mean log-probability of a byte, as the model
        would have it without either (0 is certain). Elsewhere the server writes one of them, bound by a schema:
        that one has 1, the others 0. Raises as `__call__`.
        """
        if not {"logprobs", "text_bias"} <= set(self.model().get("abilities", ())):
            schema = {"type": "string", "enum": list(candidates)}
            written = msgspec.json.decode(await self(messages, schema=schema, max_tokens=_tokens_cap(candidates)))
            return [float(candidate == written) for candidate in candidates]
        return [await self._likelihood(messages, candidate) for candidate in candidates]

    async def _likelihood(self, messages: Sequence[Mapping[str, str]], candidate: str) -> float:
        text = msgspec.json.encode(candidate)
        asked = {
            "max_tokens": _tokens_cap([candidate]),
            "temperature": 0,
            "logprobs": True,
            "logit_bias": {text.decode(): TOKEN_BIAS},  # in its quotes: a number would be taken for a token's
            "response_format": _format({"const": candidate}),
        }
        answer = await self._ask(messages, asked)
        try:
            written = answer["choices"][0]["logprobs"]["content"]
            return _mean_logprob([(_size(one), float(one["logprob"])) for one in written], len(text))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise LanguageError("the language model's answer has no log-probabilities", retriable=False) from error

    async def judged(self, parts: Sequence[Part]) -> list[str | None]:
        """Each text as the gateway's guards let it go on, None where they refuse it; without a gateway as it is.

        Raises LanguageError, DeadlineError.
        """
        place = self._place()
        if not place.guarded:
            return [part.text for part in parts]
        body = {"model": self.model()["name"], "parts": [dataclasses.asdict(part) for part in parts]}
        reply = await self._exchange(place, JUDGE_PATH, body, "the guards gave no answer")
        texts = answered(reply).get("texts")
        if not isinstance(texts, list) or len(texts) != len(parts):
            raise LanguageError("the gateway judged other texts than it was given", hint="report a defect")
        return texts

    async def stream(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        parts: Sequence[Part] = (),
        grounds: Sequence[str] = (),
    ) -> AsyncGenerator[str]:
        """The answer's text, piece by piece; leaving the iterator ends it. Raises LanguageError, RefusedError."""
        place = self._place()
        body: dict[str, Any] = {
            "model": self.model()["name"],
            "messages": list(messages),
            "stream": True,
            "max_tokens": max_tokens,
            "temperature": temperature,
        }
        if place.guarded:
            body["millhand"] = {"grounds": list(grounds), "parts": [dataclasses.asdict(part) for part in parts]}
        async for chunk in stream(f"{place.url}/v1/chat/completions", body, place.headers, self._timeout_s):
            for choice in chunk.get("choices") or ():
                if piece := (choice.get("delta") or {}).get("content"):
                    yield str(piece)
                if choice.get("finish_reason") in REFUSED:
                    raise RefusedError("a guard stopped the answer", hint="see the audit of the gateway")

    async def _ask(self, messages: Sequence[Mapping[str, str]], asked: Mapping[str, Any]) -> dict[str, Any]:
        place = self._place()
        body = {"model": self.model()["name"], "messages": list(messages), **asked}
        reply = await self._exchange(place, "/v1/chat/completions", body, "the language model gave no answer")
        _raise_refusal(reply)
        answer = answered(reply)
        if _finish(answer) in REFUSED:
            raise RefusedError("a guard refused the answer", hint="see the audit of the gateway")
        return answer

    async def _exchange(self, place: Place, path: str, body: Mapping[str, Any], late: str) -> Reply:
        try:
            return await exchange(f"{place.url}{path}", body=body, headers=place.headers, timeout_s=self._timeout_s)
        except TimeoutError as error:
            raise DeadlineError(
                f"{late} within {self._timeout_s:g} s", hint="ask for fewer tokens, or take a smaller model"
            ) from error

    def model(self) -> Mapping[str, Any]:
        """What is told of the model that is asked. Raises LanguageError where none is configured."""
        models = self._models()
        if not models:
            raise LanguageError("no language model is configured", hint="name one as [language] model", retriable=False)
        return models[0]


def _format(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


def _require_json(text: str, answer: dict[str, Any]) -> None:
    try:
        msgspec.json.decode(text)
    except msgspec.MsgspecError as error:
        cut = _finish(answer) == "length"
        why = "it was cut off at max_tokens" if cut else "it is no JSON"
        raise LanguageError(f"the language model's answer is not usable: {why}", hint="allow more tokens") from error


def _finish(answer: dict[str, Any]) -> str:
    choices = answer.get("choices") or [{}]
    return str(choices[0].get("finish_reason", "")) if isinstance(choices[0], dict) else ""


def _raise_refusal(reply: Reply) -> None:
    if reply.status == 200:
        return
    try:
        error = msgspec.json.decode(reply.body)["error"]
        code, message = str(error.get("code", "")), str(error.get("message", ""))
    except (msgspec.MsgspecError, KeyError, TypeError, AttributeError):
        return
    if code in REFUSED:
        raise RefusedError(message)


def _tokens_cap(candidates: Sequence[str]) -> int:
    """Tokens that any of them takes as a JSON string, spaces behind it included: at most one for each byte."""
    return max(len(msgspec.json.encode(candidate)) for candidate in candidates) + 32


def _size(token: Mapping[str, Any]) -> int:
    """Bytes of a token; one that is a part of a character has them in `bytes` only."""
    return len(token.get("bytes") or str(token["token"]).encode())


def _mean_logprob(written: Sequence[tuple[int, float]], size: int) -> float:
    """Of a byte of the first `size`, from (bytes of a token, its log-probability); what comes behind does not count."""
    seen, total = 0, 0.0
    for token_size, logprob in written:
        if seen >= size:
            break
        seen, total = seen + token_size, total + logprob
    if seen < size:
        raise ValueError("the answer is shorter than the candidate")
    return total / size
