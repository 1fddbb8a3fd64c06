"""A frame is read back as it was packed, and a malformed one costs nothing but its stream."""

from __future__ import annotations

import asyncio
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2ptrain.errors import BadMessage
from p2ptrain.records import MAX_HEADER_BYTES, Ballot, Chunk, GetRun, PeerId, Refusal, Wire
from p2ptrain.swarm.frames import pack, read_frame


def read(data: bytes, max_payload_bytes: int = 100) -> tuple[Wire, bytes, int]:
    async def reading() -> tuple[Wire, bytes, int]:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        return await read_frame(reader, max_payload_bytes=max_payload_bytes)

    return asyncio.run(reading())


@given(st.binary(max_size=100), st.integers(0, 2**53 - 1), st.text(max_size=300))
def test_frame_is_read_back_when_it_was_packed(payload: bytes, number: int, reason: str) -> None:
    headers: list[Wire] = [
        GetRun(),
        Refusal(reason=reason),
        Chunk(
            step=1,
            parent="e" * 64,
            ballot=Ballot(number=2, leader=PeerId("peer")),
            freeze="f" * 64,
            number=number,
            samples=3,
        ),
    ]
    for header in headers:
        data = pack(header, len(payload)) + payload
        assert read(data + b"the next frame") == (header, payload, len(data))


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">II", MAX_HEADER_BYTES + 1, 0),
        struct.pack(">II", 2, 101),
        struct.pack(">II", 2**32 - 1, 2**32 - 1),
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack(">II", 0, 0),
        struct.pack(">II", 2, 0) + b"{}",
        struct.pack(">II", 3, 0) + b"\xff\xfe\xfd",
        struct.pack(">II", 100_000, 0) + b"[" * 100_000,
        struct.pack(">II", 18, 0) + b'{"kind":"get_run"}'.replace(b"get", b"put"),
        struct.pack(">II", 29, 0) + b'{"kind":"get_run","more":123}',
    ],
)
def test_reading_raises_bad_message_when_a_frame_is_malformed(data: bytes) -> None:
    with pytest.raises(BadMessage):
        read(data)


@given(st.integers(0, len(pack(GetRun(), 5)) + 4))
def test_reading_raises_eof_when_the_stream_ends_within_a_frame(length: int) -> None:
    with pytest.raises(EOFError):
        read((pack(GetRun(), 5) + b"12345")[:length])


def test_packing_raises_when_a_header_is_larger_than_others_take() -> None:
    class Long(Refusal):
        reason: str

    with pytest.raises(ValueError, match="at most"):
        pack(Long(reason="x" * MAX_HEADER_BYTES))
