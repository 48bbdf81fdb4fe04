"""The OpenAPI 3.1 document of what is served: GET /v2/openapi.json. Its examples are the models that are ready."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from millhand import __version__
from millhand.serving.tensors import DATATYPES

_ERRORS = {
    "400": "The request is wrong; `error` says what and what to do.",
    "401": "The token is missing.",
    "403": "The token is wrong, or models are not managed over HTTP here.",
    "404": "No such model or version.",
    "413": "The body is too large.",
    "503": "Not now: the model is not ready, its worker is restarted, or too many requests wait. Send it again.",
    "504": "The deadline passed.",
}
_INTEGER = {"type": "integer", "minimum": 0}
_NAMED_TENSOR = {"name": {"type": "string"}, "datatype": {"type": "string", "enum": list(DATATYPES)}}


EXAMPLE_ELEMENTS_CAP = 256
"""A model whose smallest request is larger is no example."""


def document(models: Mapping[str, Any]) -> dict[str, Any]:
    """The document. `models`: name -> inputs, and sockets by version, as the daemon tells of them."""
    requests = _example_requests(models)
    versions = sorted({version for name in requests for version in models[name]["sockets"]}, key=int)
    model, version = {"$ref": "#/components/parameters/model"}, {"$ref": "#/components/parameters/version"}
    paths: dict[str, Any] = {
        "/v2": {"get": _operation("server", "The server and its extensions", _ref("ServerMetadata"))},
        "/v2/health/live": {"get": _operation("live", "Whether the server lives", _flag("live"))},
        "/v2/health/ready": {
            "get": _operation("ready", "Whether every model that should be served answers", _flag("ready"), ["503"])
        },
        "/v2/models/stats": {
            "get": _operation("allStatistics", "Counts of every version", _ref("Statistics"), ["503", "504"])
        },
        "/v2/repository/index": {
            "post": {
                **_operation(
                    "index",
                    "Models on disk and what serves of them",
                    _ref("Index"),
                    ["400", "401", "403", "503", "504"],
                    body=_ref("IndexWish"),
                ),
                "security": [{"token": []}],
            }
        },
        "/metrics": {"get": _metrics()},
        "/v2/openapi.json": {"get": _operation("openapi", "This document", {"type": "object"})},
    }
    for action in ("load", "unload"):
        paths[f"/v2/repository/models/{{model}}/{action}"] = {
            "parameters": [model],
            "post": {
                **_operation(f"{action}Model", f"Make the node {action} a model", {"type": "object"},
                             ["400", "401", "403", "404", "503"], body={"type": "object"}),
                "security": [{"token": []}],
            },
        }  # fmt: skip
    for versioned in (False, True):
        prefix = "/v2/models/{model}" + ("/versions/{version}" if versioned else "")
        suffix = "OfVersion" if versioned else ""
        parameters = [model, version] if versioned else [model]
        asked = ["404", "503", "504"]  # what the daemon is asked for
        operations = {
            "": ("get", _operation(f"model{suffix}", "What a model takes and gives", _ref("Model"), ["404", "503"])),
            "/ready": (
                "get", _operation(f"modelReady{suffix}", "Whether it answers", _ref("ModelReady"), ["404", "503"])
            ),
            "/config": (
                "get",
                _operation(f"config{suffix}", "Triton's model configuration", {"type": "object"}, asked),
            ),
            "/stats": ("get", _operation(f"statistics{suffix}", "Its counts", _ref("Statistics"), asked)),
            "/infer": ("post", _infer(f"infer{suffix}")),
        }  # fmt: skip
        for rest, (method, operation) in operations.items():
            paths[prefix + rest] = {"parameters": parameters, method: operation}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "millhand",
            "version": __version__,
            "description": "Open Inference Protocol v2 with Triton's extensions, and metrics.",
        },
        "paths": paths,
        "components": {
            "schemas": _schemas(),
            "parameters": {"model": _path_parameter("model", list(requests)),
                           "version": _path_parameter("version", versions)},
            "requestBodies": {"Infer": _infer_body(requests)},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }  # fmt: skip


def _operation(
    name: str, summary: str, schema: dict[str, Any], errors: list[str] | None = None, body: Any = None
) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": name,
        "summary": summary,
        "responses": {"200": _json("Done", schema), **_errors(errors or [])},
    }
    if body is not None:
        operation["requestBody"] = {"required": False, "content": {"application/json": {"schema": body}}}
    return operation


def _infer(name: str) -> dict[str, Any]:
    header = {"Inference-Header-Content-Length": {"schema": _INTEGER, "description": "Bytes of JSON before the data"}}
    answer = _json("The outputs", _ref("InferResponse"))
    answer["content"]["application/octet-stream"] = {}
    answer["headers"] = header
    operation = _operation(name, "Infer", _ref("InferResponse"), ["400", "404", "413", "503", "504"])
    operation["responses"]["200"] = answer
    operation["requestBody"] = {"$ref": "#/components/requestBodies/Infer"}
    operation["parameters"] = [
        {
            "name": "Inference-Header-Content-Length",
            "in": "header",
            "required": False,
            "schema": _INTEGER,
            "description": "Bytes of the JSON that begins a body with binary data; 0: the body is the only input",
        }
    ]
    return operation


def _infer_body(requests: dict[str, Any]) -> dict[str, Any]:
    json_body = {"schema": _ref("InferRequest"), "examples": _examples(requests)}
    return {"required": True, "content": {"application/json": json_body, "application/octet-stream": {}}}


def _metrics() -> dict[str, Any]:
    text = {"description": "Prometheus' text format", "content": {"text/plain": {"schema": {"type": "string"}}}}
    return {
        "operationId": "metrics",
        "summary": "What the node measures of itself",
        "parameters": [
            {"name": "names", "in": "query", "required": False, "schema": {"type": "string", "enum": ["triton"]}}
        ],
        "responses": {"200": text, **_errors(["400", "503", "504"])},
    }


def _schemas() -> dict[str, Any]:
    tensor = {"type": "object", "required": ["name", "datatype", "shape"], "properties": {
        **_NAMED_TENSOR, "shape": {"type": "array", "items": {"type": "integer"}}}}  # fmt: skip
    sent = {"type": "object", "required": ["name", "shape", "datatype"], "properties": {
        **_NAMED_TENSOR, "shape": {"type": "array", "items": _INTEGER}, "data": {"type": "array"},
        "parameters": {"type": "object"}}}  # fmt: skip
    named = {"type": "object", "required": ["name"], "properties": {
        "name": {"type": "string"}, "parameters": {"type": "object"}}}  # fmt: skip
    request = {"type": "object", "required": ["inputs"], "properties": {
        "id": {"type": "string"}, "parameters": {"type": "object"},
        "inputs": {"type": "array", "items": sent}, "outputs": {"type": "array", "items": named}}}  # fmt: skip
    response = {"type": "object", "required": ["model_name", "model_version", "outputs"], "properties": {
        "id": {"type": "string"}, "model_name": {"type": "string"}, "model_version": {"type": "string"},
        "outputs": {"type": "array", "items": sent}}}  # fmt: skip
    model = {"type": "object", "required": ["name", "versions", "platform", "inputs", "outputs"], "properties": {
        "name": {"type": "string"}, "platform": {"type": "string"},
        "versions": {"type": "array", "items": {"type": "string"}},
        "inputs": {"type": "array", "items": tensor}, "outputs": {"type": "array", "items": tensor}}}  # fmt: skip
    entry = {"type": "object", "required": ["name", "version", "state", "reason"], "properties": {
        "name": {"type": "string"}, "version": {"type": "string"}, "reason": {"type": "string"},
        "state": {"type": "string", "enum": ["READY", "UNAVAILABLE"]}}}  # fmt: skip
    server = {"type": "object", "required": ["name", "version", "extensions"], "properties": {
        "name": {"type": "string"}, "version": {"type": "string"},
        "extensions": {"type": "array", "items": {"type": "string"}}}}  # fmt: skip
    statistics = {"type": "object", "required": ["model_stats"], "properties": {
        "model_stats": {"type": "array", "items": {"type": "object"}}}}  # fmt: skip
    return {
        "Error": {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}},
        "ServerMetadata": server,
        "Model": model,
        "ModelReady": {"type": "object", "required": ["name", "ready"], "properties": {
            "name": {"type": "string"}, "ready": {"type": "boolean"}}},
        "InferRequest": request,
        "InferResponse": response,
        "Statistics": statistics,
        "Index": {"type": "array", "items": entry},
        "IndexWish": {"type": "object", "properties": {"ready": {"type": "boolean"}}},
    }  # fmt: skip


def _json(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _errors(codes: list[str]) -> dict[str, Any]:
    return {code: _json(_ERRORS[code], _ref("Error")) for code in codes}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _flag(name: str) -> dict[str, Any]:
    return {"type": "object", "required": [name], "properties": {name: {"type": "boolean"}}}


def _path_parameter(name: str, values: list[str]) -> dict[str, Any]:
    pattern = r"^[0-9]+$" if name == "version" else r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
    schema = {"type": "string", "pattern": pattern}
    examples = _examples({value: value for value in values})
    return {"name": name, "in": "path", "required": True, "schema": schema, "examples": examples}


def _examples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: {"value": value} for name, value in values.items()}


def _example_requests(models: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> the smallest request, all zeros, of every model that is ready."""
    requests = {}
    for name, model in sorted(models.items()):
        inputs = [_zeros(tensor) for tensor in model["inputs"]]
        if model["sockets"] and sum(len(tensor["data"]) for tensor in inputs) <= EXAMPLE_ELEMENTS_CAP:
            requests[name] = {"inputs": inputs}
    return requests


def _zeros(tensor: dict[str, Any]) -> dict[str, Any]:
    shape, datatype = [max(size, 1) for size in tensor["shape"]], tensor["datatype"]
    zero: Any = {"BOOL": False, "BYTES": ""}.get(datatype, 0)
    count = min(math.prod(shape), EXAMPLE_ELEMENTS_CAP + 1)
    return {"name": tensor["name"], "datatype": datatype, "shape": shape, "data": [zero] * count}
