from collections.abc import Iterator
from typing import Literal

from google.protobuf.message import Message

class _Strings:
    def append(self, item: str) -> None: ...
    def __iter__(self) -> Iterator[str]: ...

class _PropertyValues:
    def add(self, *, type: int = ..., int_value: int = ..., string_value: str = ...) -> Payload.PropertyValue: ...
    def __iter__(self) -> Iterator[Payload.PropertyValue]: ...

class _Metrics:
    def add(self) -> Payload.Metric: ...
    def __iter__(self) -> Iterator[Payload.Metric]: ...
    def __len__(self) -> int: ...

class Payload(Message):
    class PropertyValue(Message):
        type: int
        is_null: bool
        int_value: int
        long_value: int
        double_value: float
        boolean_value: bool
        string_value: str

    class PropertySet(Message):
        keys: _Strings
        values: _PropertyValues

    class Metric(Message):
        name: str
        alias: int
        timestamp: int
        datatype: int
        is_historical: bool
        is_transient: bool
        is_null: bool
        properties: Payload.PropertySet
        int_value: int
        long_value: int
        float_value: float
        double_value: float
        boolean_value: bool
        string_value: str
        bytes_value: bytes
        def WhichOneof(self, oneof_group: str | bytes) -> str | None: ...

    timestamp: int
    seq: int
    uuid: str
    body: bytes
    metrics: _Metrics
    def HasField(self, field_name: Literal["timestamp", "seq", "uuid", "body"] | str | bytes) -> bool: ...
