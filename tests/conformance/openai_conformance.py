"""OpenAI's own client against a gateway: prints one JSON object, check -> "ok" or what went wrong.

`python openai_conformance.py --url URL --model MODEL --token TOKEN [--scripted]`. Against a real model it checks forms;
with `--scripted` the server does what the last message asks of it, and texts are checked too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import traceback
from collections.abc import Callable
from typing import Any

import openai

SCHEMA = {
    "type": "object",
    "properties": {"part": {"type": "string", "maxLength": 40}, "minutes": {"type": "integer"}},
    "required": ["part", "minutes"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "read_sensor",
        "description": "Read a sensor of a machine.",
        "parameters": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
    },
}
checks: dict[str, Callable[[openai.OpenAI, str], None]] = {}
scripted: dict[str, Callable[[openai.OpenAI, str], None]] = {}


def check(function: Any) -> Any:
    checks[function.__name__] = function
    return function


def scripted_check(function: Any) -> Any:
    scripted[function.__name__] = function
    return function


def user(text: Any) -> list[dict[str, str]]:
    return [{"role": "user", "content": text if isinstance(text, str) else json.dumps(text)}]


def refused(ask: Callable[[], Any], kind: type[openai.APIStatusError], **fields: str) -> None:
    try:
        ask()
    except kind as error:
        assert isinstance(error.body, dict) and error.body["message"], error.body
        for name, value in fields.items():
            assert error.body[name] == value, error.body
    else:
        raise AssertionError(f"no {kind.__name__} came")


@check
def models(client: openai.OpenAI, model: str) -> None:
    assert model in [one.id for one in client.models.list()]
    assert client.models.retrieve(model).id == model
    refused(lambda: client.models.retrieve("none"), openai.NotFoundError, code="model_not_found")


@check
def chat(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(model=model, messages=user("Say hello."), max_tokens=12, temperature=0)
    assert answer.choices[0].message.content and answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage and answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@check
def chat_stream(client: openai.OpenAI, model: str) -> None:
    stream = client.chat.completions.create(
        model=model, messages=user("Say hello."), max_tokens=12, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text and chunks[-1].usage and chunks[-1].usage.completion_tokens > 0
    ends = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
    assert len(ends) == 1


@check
def stream_without_usage(client: openai.OpenAI, model: str) -> None:
    chunks = list(client.chat.completions.create(model=model, messages=user("Hello."), max_tokens=4, stream=True))
    assert all(chunk.choices for chunk in chunks) and all(chunk.usage is None for chunk in chunks)


@check
def stream_helper(client: openai.OpenAI, model: str) -> None:
    with client.chat.completions.stream(model=model, messages=user("Say hello."), max_tokens=8) as stream:
        for _ in stream:
            pass
        try:
            final = stream.get_final_completion()
        except openai.LengthFinishReasonError as cut:  # the helper's way of saying that max_tokens was reached
            final = cut.completion
        assert final.choices[0].message.content


@check
def json_schema(client: openai.OpenAI, model: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "order", "schema": SCHEMA, "strict": True}}
    script = "Which part, how many minutes?"
    answer = client.chat.completions.create(
        model=model, messages=user(script), response_format=form, max_tokens=80, temperature=0
    )
    content = answer.choices[0].message.content
    assert content
    if not arguments.scripted:
        assert set(json.loads(content)) == {"part", "minutes"}, content


@check
def seed_stop_logprobs(client: openai.OpenAI, model: str) -> None:
    options: dict[str, Any] = {"model": model, "messages": user("Count: one two"), "max_tokens": 12, "seed": 7}
    first = client.chat.completions.create(**options, stop=["\n\n"])
    again = client.chat.completions.create(**options, stop=["\n\n"])
    assert first.choices[0].message.content == again.choices[0].message.content
    answer = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    assert arguments.scripted or answer.choices[0].logprobs


@check
def completions(client: openai.OpenAI, model: str) -> None:
    assert client.completions.create(model=model, prompt="The pump", max_tokens=8).choices[0].text
    stream = client.completions.create(model=model, prompt="The pump", max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream)


@check
def errors(client: openai.OpenAI, model: str) -> None:
    ask = client.chat.completions.create
    refused(lambda: ask(model="none", messages=user("x")), openai.NotFoundError, code="model_not_found", param="model")
    refused(lambda: ask(model=model, messages=[]), openai.BadRequestError, param="messages")
    refused(lambda: ask(model=model, messages=user("x"), max_tokens=10**9), openai.BadRequestError, param="max_tokens")
    refused(lambda: ask(model=model, messages=user("x"), n=3), openai.BadRequestError, param="n")
    refused(
        lambda: ask(model=model, messages=user("x"), extra_body={"chat_template": "x"}),
        openai.BadRequestError,
        code="unknown_field",
    )
    other = client.with_options(api_key="wrong")
    refused(lambda: other.chat.completions.create(model=model, messages=user("x")), openai.AuthenticationError)


@check
def leaving_a_stream(client: openai.OpenAI, model: str) -> None:
    stream = client.chat.completions.create(model=model, messages=user("Tell a story."), max_tokens=400, stream=True)
    next(iter(stream))
    stream.close()
    chat(client, model)


@check
def many_at_once(client: openai.OpenAI, model: str) -> None:
    async def all_of_them() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key=client.api_key) as many:
            ask = many.chat.completions.create
            return await asyncio.gather(*(ask(model=model, messages=user("Hi."), max_tokens=4) for _ in range(8)))

    assert all(answer.choices[0].message.content for answer in asyncio.run(all_of_them()))


@scripted_check
def tools(client: openai.OpenAI, model: str) -> None:
    ask = client.chat.completions.create
    call = {"id": "call-1", "type": "function", "function": {"name": "read_sensor", "arguments": '{"name": "t1"}'}}
    answer = ask(model=model, messages=user({"calls": [call]}), tools=[TOOL], tool_choice="required")
    found = answer.choices[0].message.tool_calls[0]
    assert found.function.name == "read_sensor" and json.loads(found.function.arguments) == {"name": "t1"}
    with client.chat.completions.stream(model=model, messages=user({"calls": [call]}), tools=[TOOL]) as stream:
        for _ in stream:
            pass
        found = stream.get_final_completion().choices[0].message.tool_calls[0]
    assert found.function.name == "read_sensor" and json.loads(found.function.arguments) == {"name": "t1"}
    turns = [
        *user("How warm is it?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call-1", "content": "71 °C"},
        *user("So?"),
    ]
    assert ask(model=model, messages=turns, tools=[TOOL]).choices[0].message.content


@scripted_check
def embeddings(client: openai.OpenAI, model: str) -> None:
    answer = client.embeddings.create(model=model, input=["ab", "abc"], encoding_format="float")
    assert [row.embedding[0] for row in answer.data] == [2.0, 3.0]


@scripted_check
def a_server_that_dies(client: openai.OpenAI, model: str) -> None:
    script = {"tokens": 9, "stop_after": 3, "ending": "die"}
    text = ""
    try:
        for chunk in client.chat.completions.create(model=model, messages=user(script), stream=True):
            text += chunk.choices[0].delta.content or ""
    except openai.APIError as error:
        assert "broke off" in error.message and text == " w0 w1 w2"
    else:
        raise AssertionError("no error came")


@scripted_check
def too_long(client: openai.OpenAI, model: str) -> None:
    script = {"status": 400, "error": {"message": "too long", "type": "exceed_context_size_error"}}
    ask = client.chat.completions.create
    refused(lambda: ask(model=model, messages=user(script)), openai.BadRequestError, code="context_length_exceeded")


def outcome(function: Callable[[openai.OpenAI, str], None], client: openai.OpenAI, model: str) -> str:
    try:
        function(client, model)
    except Exception:
        return traceback.format_exc(limit=3)
    return "ok"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("--url", "--model", "--token"):
        parser.add_argument(name, required=True)
    parser.add_argument("--scripted", action="store_true")
    arguments = parser.parse_args()
    asked = openai.OpenAI(base_url=f"{arguments.url}/v1", api_key=arguments.token, max_retries=0, timeout=60)
    wanted = {**checks, **(scripted if arguments.scripted else {})}
    print(json.dumps({name: outcome(function, asked, arguments.model) for name, function in wanted.items()}))
