"""Coverage-guided fuzzing of every parser that takes bytes from outside, by atheris (libFuzzer for Python).

    python -m tests.security.fuzz --seconds 60
    python -m tests.security.fuzz --seconds 3600          # the hour before a release, on one core
    python -m tests.security.fuzz crash-…                 # what was found, again

The first byte of an input chooses the parser, the rest is what it is given. A parser may refuse in the ways
that it says it does; anything else, over 20 seconds or two gigabytes for an input included, ends the run,
and the input is written to the current folder. `corpus/` holds inputs that reach different code: seeds
that this file makes (`--seeds`), and what long runs have found, merged (`--merge FOLDER`). Not covered: what
is not Python: pydantic, safetensors, OpenSSL and p2pd are exercised, and not guided through.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import atheris
import msgpack
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http import HttpRequestParser
from aiohttp.http_exceptions import HttpProcessingError

GUIDED = [
    "p2ptrain.config", "p2ptrain.events", "p2ptrain.records", "p2ptrain.gradients.codecs",
    "p2ptrain.replica.snapshot", "p2ptrain.swarm", "peers.daemon",
]  # fmt: skip

with atheris.instrument_imports(include=GUIDED):
    import torch

    from p2ptrain import events
    from p2ptrain.config import PeerConfig, RunConfig, canonical_json, commented_toml, parse_run
    from p2ptrain.config import _validated as validated
    from p2ptrain.errors import BadMessage, LocalFault, P2PTrainError
    from p2ptrain.gradients.codecs import codec_named
    from p2ptrain.records import SIGNED, WIRE, GetRun, Manifest, Position, Presence
    from p2ptrain.replica.snapshot import State, unpack
    from p2ptrain.replica.snapshot import pack as packed_state
    from p2ptrain.swarm import reach
    from p2ptrain.swarm.access import MAX_INVITE_CHARACTERS, _wrapped, decode, encode
    from p2ptrain.swarm.flow import Flow
    from p2ptrain.swarm.frames import pack, read_frame
    from p2ptrain.swarm.gate import revoke
    from p2ptrain.swarm.identity import _parse as identity_in
    from p2ptrain.swarm.validator import RecordValidator, seal
    from peers.daemon import ControlServer
    from tests.unit.organizer import ORGANIZER, RUN_ID, invite

CORPUS = Path(__file__).parent / "corpus"
LARGEST_INPUT_BYTES = 8192
SLOW_SECONDS = 20
MEGABYTES = 2048
KEY = b"k" * 20
LOOP = asyncio.new_event_loop()
VALUES = torch.empty(64)
CODECS = [codec_named(name) for name in ("fp32", "fp16", "bf16", "int8", "int4")]


def records(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        WIRE.validate_json(data)


def signed_records(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        SIGNED.validate_json(data)


def frames(data: bytes) -> None:
    async def main() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        with contextlib.suppress(BadMessage, EOFError):
            while True:
                await read_frame(reader, max_payload_bytes=4096)

    LOOP.run_until_complete(main())


def flow(data: bytes) -> None:
    """The same frames on a TLS connection, in pieces of the size that the first byte says."""

    async def main() -> None:
        there = Flow(4096)
        step = 1 + (data[0] if data else 0)
        for start in range(1, len(data), step):
            piece = memoryview(data[start : start + step])
            while piece and there._fault is None and len(there._frames) < 2:
                room = there.get_buffer(-1)
                assert room, "no room for what comes"
                taken = min(len(room), len(piece))
                room[:taken] = piece[:taken]
                there.buffer_updated(taken)
                piece = piece[taken:]
            there._frames.clear()

    LOOP.run_until_complete(main())


def invites(data: bytes) -> None:
    with contextlib.suppress(P2PTrainError):
        decode(data.decode(errors="replace"))


def invites_inside(data: bytes) -> None:
    """With an envelope that is right, so that the JSON is reached."""
    if len(data) < MAX_INVITE_CHARACTERS // 2:
        with contextlib.suppress(P2PTrainError):
            decode(_wrapped(data))


def runs(data: bytes) -> None:
    with contextlib.suppress(BadMessage):
        parse_run(data)


def run_files(data: bytes) -> None:
    try:
        document = tomllib.loads(data.decode())
    except (ValueError, RecursionError):
        return
    for kind in (RunConfig, PeerConfig):
        with contextlib.suppress(LocalFault):
            validated(kind, document, "a file")


def snapshots(data: bytes) -> None:
    with contextlib.suppress(BadMessage):
        unpack(data)


def codecs(data: bytes) -> None:
    if data:
        with contextlib.suppress(BadMessage):
            CODECS[data[0] % len(CODECS)].decode(data[1:], VALUES)


class _Stored:
    """hivemind's `DHTRecord`."""

    def __init__(self, key: bytes, subkey: bytes, value: bytes, expiration_time: float) -> None:
        self.key, self.subkey, self.value, self.expiration_time = key, subkey, value, expiration_time


def dht(data: bytes) -> None:
    split = data[0] if data else 0
    subkey, value = data[1 : 1 + split], data[1 + split :]
    RecordValidator([KEY], clock=lambda: 0.0).validate(_Stored(KEY, subkey, value, 60.0))


def relays(data: bytes) -> None:
    async def main() -> bytes:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        return await reach.read_message(reader)

    with contextlib.suppress(BadMessage, EOFError):
        reach.granted(LOOP.run_until_complete(main()))
    text = data.decode(errors="replace")
    reach.target(text, 1)
    reach.port_of(text)
    reach.is_relayed(text)


def identities(data: bytes) -> None:
    with contextlib.suppress(LocalFault):
        identity_in(data, Path("a file"))


def control(data: bytes) -> None:
    server = ControlServer(Path("/nowhere"), "run", lambda request: {"got": len(request)})
    server._reply(data)


def journals(data: bytes) -> None:
    with contextlib.suppress(ValueError, RecursionError):
        line = json.loads(data)
        if isinstance(line, dict) and (event := events.from_dict(line)) is not None:
            event.sentence()


def http(data: bytes) -> None:
    """As `telemetry.health` has aiohttp parse it."""
    parser = HttpRequestParser(
        BaseProtocol(LOOP), LOOP, 2**16, max_line_size=4096, max_field_size=4096, max_headers=64
    )
    with contextlib.suppress(HttpProcessingError, ValueError):
        parser.feed_data(data)


PARSERS: list[Callable[[bytes], None]] = [
    records, signed_records, frames, flow, invites, invites_inside, runs, run_files, snapshots, codecs, dht,
    relays, identities, control, journals, http,
]  # fmt: skip


def one_input(data: bytes) -> None:
    """What atheris calls."""
    if data:
        PARSERS[data[0] % len(PARSERS)](bytes(data[1:]))


def seeds() -> Iterator[tuple[str, bytes]]:
    """Something that each parser takes, to begin from."""
    made = invite()
    here = Position(step=3, lineage="a" * 64, weight=7)
    manifest = Manifest(
        position=here, state_digest="b" * 64, size_bytes=10, piece_bytes=10, pieces=("c" * 64,), last=None
    )
    presence = Presence(
        peer=ORGANIZER.peer_id, role="train", name="lab", protocol=1, fingerprint="0" * 64, incarnation="i",
        position=here, access=made.shown_by(ORGANIZER.peer_id),
    )  # fmt: skip
    text = presence.model_dump_json().encode()
    author = msgpack.packb(ORGANIZER.peer_id)
    stored = bytes([len(author)]) + author + msgpack.packb(seal(ORGANIZER, KEY, text, 60.0))
    tensors = {"weight": torch.zeros(2)}
    state = State(parameters=tensors, optimizer={"moment": torch.zeros(2)}, scalars={"step": 1.0})
    examples: dict[Callable[[bytes], None], list[bytes]] = {
        records: [manifest.model_dump_json().encode()],
        signed_records: [text, revoke(ORGANIZER, RUN_ID, 1, [2]).model_dump_json().encode()],
        frames: [pack(GetRun()) + pack(manifest)],
        flow: [b"\x10" + pack(GetRun()) + pack(manifest)],
        invites: [encode(made).encode()],
        invites_inside: [made.model_dump_json().encode()],
        runs: [canonical_json(RunConfig()).encode()],
        run_files: [commented_toml(PeerConfig()).encode()[:4000], b'run_id = "x"\n[task]\nwidth = 32\n'],
        snapshots: [packed_state(state)],
        codecs: [bytes([at]) + bytes(codec.encode(torch.ones(64))) for at, codec in enumerate(CODECS)],
        dht: [stored],
        relays: [b"\x04" + reach.RESERVE[1:], b"/ip4/127.0.0.1/tcp/4001"],
        identities: [bytes.fromhex("08011240") + bytes(64)],
        control: [b'{"ask": "pause", "seconds": 60}\n'],
        journals: [json.dumps({"event": "paused", "reasons": ["user"], "seconds": None}).encode()],
        http: [b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"],
    }
    assert examples.keys() == set(PARSERS)
    for parser, inputs in examples.items():
        for number, data in enumerate(inputs):
            yield f"{parser.__name__}-{number}", bytes([PARSERS.index(parser)]) + data


INNER = "--inner"
"""How libFuzzer starts this again, to merge: its own options follow."""


def main() -> None:
    logging.disable()
    asyncio.set_event_loop(LOOP)
    again = f"{sys.executable} -m tests.security.fuzz {INNER}"
    if sys.argv[1:2] == [INNER]:
        atheris.Setup([again, *sys.argv[2:]], one_input)
        atheris.Fuzz()
    parser = argparse.ArgumentParser(prog="python -m tests.security.fuzz", description=__doc__)
    parser.add_argument("inputs", nargs="*", help="play these and no others")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--into", default="", help="folder for what reaches new code; else it is forgotten")
    parser.add_argument("--seeds", action="store_true", help="write the seeds into the corpus, and end")
    parser.add_argument("--merge", default="", help="take over from this folder what the corpus lacks")
    given = parser.parse_args()
    if given.seeds:
        CORPUS.mkdir(exist_ok=True)
        for name, data in seeds():
            (CORPUS / name).write_bytes(data)
        return
    options = [
        f"-max_len={LARGEST_INPUT_BYTES}", f"-timeout={SLOW_SECONDS}", f"-rss_limit_mb={MEGABYTES}",
        "-print_final_stats=1", "-verbosity=1",
    ]  # fmt: skip
    if given.inputs:
        words = [*options, *given.inputs]
    elif given.merge:
        words = [*options, "-merge=1", str(CORPUS), given.merge]
    else:
        # libFuzzer writes what it finds into the first folder.
        into = given.into or tempfile.mkdtemp(prefix="p2ptrain-fuzz-")
        words = [*options, f"-max_total_time={given.seconds}", into, str(CORPUS)]
    atheris.Setup([again, *words], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
