"""One frame on a stream: two lengths, a header that is a record, and a payload of raw bytes beside it.

    u32 header bytes | u32 payload bytes | header, JSON | payload        (big-endian)

Both lengths are checked before anything is allocated for them: a stranger's eight bytes cannot cost memory.
"""

from __future__ import annotations

import asyncio
import struct

from pydantic import ValidationError

from p2ptrain.errors import BadMessage
from p2ptrain.records import MAX_HEADER_BYTES, WIRE, Wire

_LENGTHS = struct.Struct(">II")
LENGTHS_BYTES = _LENGTHS.size


def pack(header: Wire, payload_bytes: int = 0) -> bytes:
    """The frame up to its payload; `payload_bytes` more must follow on the stream."""
    text = header.model_dump_json().encode()
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(
            f"a {header.kind} header of {len(text)} bytes; at most {MAX_HEADER_BYTES} may be sent"
        )
    return _LENGTHS.pack(len(text), payload_bytes) + text


def lengths(
    head: bytes | memoryview, *, max_payload_bytes: int, max_header_bytes: int = MAX_HEADER_BYTES
) -> tuple[int, int]:
    """How many bytes of header and of payload follow on these first `LENGTHS_BYTES`. Raises BadMessage."""
    header_bytes, payload_bytes = _LENGTHS.unpack(head)
    if header_bytes > max_header_bytes or payload_bytes > max_payload_bytes:
        raise BadMessage(
            f"a frame of {header_bytes} header and {payload_bytes} payload bytes; "
            f"at most {max_header_bytes} and {max_payload_bytes} are taken"
        )
    return header_bytes, payload_bytes


def parse(text: bytes) -> Wire:
    """The record that this header is. Raises BadMessage."""
    try:
        return WIRE.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise BadMessage(f"a header that is no record: {first['msg']}") from None


async def read_frame(
    reader: asyncio.StreamReader, *, max_payload_bytes: int, max_header_bytes: int = MAX_HEADER_BYTES
) -> tuple[Wire, bytes, int]:
    """The next header and its payload, and how many bytes the frame had in all.

    Raises BadMessage if a length is out of bounds or the header is no record, EOFError or OSError if the
    stream ends first. After any of these the stream is of no more use.
    """
    head = await reader.readexactly(LENGTHS_BYTES)
    header_bytes, payload_bytes = lengths(
        head, max_payload_bytes=max_payload_bytes, max_header_bytes=max_header_bytes
    )
    header = parse(await reader.readexactly(header_bytes))
    payload = await reader.readexactly(payload_bytes) if payload_bytes else b""
    return header, payload, LENGTHS_BYTES + header_bytes + payload_bytes
