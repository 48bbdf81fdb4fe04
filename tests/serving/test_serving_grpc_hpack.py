"""Header compression beside the hpack package, which knows nothing of ours."""

from __future__ import annotations

import contextlib

import hpack
from hypothesis import given
from hypothesis import strategies as st

from millhand.serving.grpc.hpack import STATIC, HeaderDecoder, HeaderError, encode, unpack

FIELD = st.tuples(st.sampled_from(["grpc-timeout", "x-key", ":path", "te"]), st.text(max_size=40))


@given(blocks=st.lists(st.tuples(st.lists(FIELD, max_size=6), st.booleans()), max_size=8))
def test_blocks_of_an_encoder_are_read(blocks):
    encoder, decoder = hpack.Encoder(), HeaderDecoder(lambda fields: fields, 1 << 16)
    for fields, huffman in [*blocks, *blocks]:
        expected = tuple((name.encode(), value.encode()) for name, value in fields)
        assert decoder.decode(encoder.encode(fields, huffman=huffman)) == expected


@given(data=st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data):
    with contextlib.suppress(HeaderError):
        HeaderDecoder(lambda fields: fields, 1 << 16).decode(data)
    with contextlib.suppress(HeaderError):
        unpack(data)


@given(fields=st.lists(st.tuples(st.sampled_from([":status", "grpc-status"]), st.text(max_size=300)), max_size=4))
def test_blocks_written_here_are_read_by_others(fields):
    assert list(hpack.Decoder().decode(encode(*fields))) == fields


def test_the_static_table():
    assert [(name, value) for name, value in hpack.table.HeaderTable.STATIC_TABLE] == list(STATIC)


def test_a_known_block_is_parsed_once_until_the_table_changes():
    parsed = []
    encoder, decoder = hpack.Encoder(), HeaderDecoder(lambda fields: parsed.append(fields) or fields, 1 << 16)
    for timeout in ("1S", "1S", "1S", "2S"):
        head = decoder.decode(encoder.encode([("te", "trailers"), ("grpc-timeout", timeout)]))
        assert head == ((b"te", b"trailers"), (b"grpc-timeout", timeout.encode()))
    assert len(parsed) == 3  # the second and third are the same bytes, and the fourth changes the table
