"""The invite: it comes through mail and chat whole, or is refused in a sentence."""

import base64
import json
import string
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from p2ptrain.errors import InviteError
from p2ptrain.swarm.access import MAX_INVITE_CHARACTERS, Invite, decode, encode

PEER = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
ADDRESS = f"/ip4/127.0.0.1/tcp/31337/p2p/{PEER}"
INVITE = Invite(run_id="tiny", run_digest="0f" * 32, addresses=(ADDRESS,))

BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
addresses = st.builds(
    "/{}/{}/tcp/{}/p2p/{}".format,
    st.sampled_from(["ip4", "ip6", "dns4"]),
    st.text("0123456789abcdef.:", min_size=1, max_size=40),
    st.integers(0, 65535),
    st.text(BASE58, min_size=46, max_size=52),
)
invites = st.builds(
    Invite,
    run_id=st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True),
    run_digest=st.text("0123456789abcdef", min_size=64, max_size=64),
    addresses=st.lists(addresses, min_size=1, max_size=8).map(tuple),
)


def sealed(body: bytes) -> str:
    """An invite whose envelope is intact, around any content: what another program might make."""
    checked = body + zlib.crc32(body).to_bytes(4, "little")
    return "p2ptrain:" + base64.urlsafe_b64encode(checked).decode().rstrip("=")


def refusal(text: str) -> str:
    with pytest.raises(InviteError) as caught:
        decode(text)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 200
    return message


@given(invite=invites)
def test_invite_comes_back_when_decoded(invite):
    text = encode(invite)
    assert set(text) <= set(string.ascii_letters + string.digits + "-_:")
    assert decode(text) == invite


@given(invite=invites, data=st.data())
def test_invite_is_refused_when_one_character_changed(invite, data):
    text = encode(invite)
    place = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.characters(exclude_characters=text[place]))
    refusal(text[:place] + other + text[place + 1 :])


def test_invite_is_refused_when_any_one_character_became_any_other():
    text = encode(INVITE)
    for place, right in enumerate(text):
        for wrong in set(string.ascii_letters + string.digits + "-_+/=:. ") - {right}:
            with pytest.raises(InviteError):
                decode(text[:place] + wrong + text[place + 1 :])


def test_invite_is_refused_when_cut_short_anywhere():
    text = encode(INVITE)
    for length in range(len(text)):
        refusal(text[:length])


@given(invite=invites, data=st.data())
def test_invite_comes_back_when_a_mail_wrapped_it(invite, data):
    text = encode(invite)
    for _ in range(3):
        place = data.draw(st.integers(0, len(text)))
        text = text[:place] + data.draw(st.sampled_from(["\n", "\r\n", " ", "\n\t"])) + text[place:]
    assert decode(f"  {text} \n") == invite


def test_invite_stays_readable_when_p2ptrain_changes():
    """Invites of version 1 are out in the world: this one must be readable for ever."""
    golden = (
        "p2ptrain:eyJ2ZXJzaW9uIjoxLCJydW5faWQiOiJ0aW55IiwicnVuX2RpZ2VzdCI6IjBmMGYwZjBmMGYwZjBmMGYwZjBmMGY"
        "wZjBmMGYwZjBmMGYwZjBmMGYwZjBmMGYwZjBmMGYwZjBmMGYwZjBmMGYiLCJhZGRyZXNzZXMiOlsiL2lwNC8xMjcuMC4wLjE"
        "vdGNwLzMxMzM3L3AycC8xMkQzS29vV0RwSjdBczdCV0F3Uk1mdTFWVTJXQ3FOanZxMzg3SkVZS0RCajRreDZuWFROIl19EAV"
        "zWA"
    )
    assert decode(golden) == INVITE
    assert encode(INVITE) == golden


def test_largest_invite_fits_when_every_bound_is_reached():
    address = f"/dns4/{'x' * 190}/tcp/31337/p2p/{'Q' * 46}".ljust(256, "x")
    largest = Invite(run_id="r" * 63, run_digest="0" * 64, addresses=(address[:256],) * 8)
    assert len(encode(largest)) < MAX_INVITE_CHARACTERS / 4
    assert decode(encode(largest)) == largest


@pytest.mark.parametrize(
    "address",
    [
        ADDRESS,
        f"/dns4/example.org/tcp/443/p2p/{PEER}",
        f"/ip4/127.0.0.1/udp/1/quic-v1/p2p/{PEER}/p2p-circuit",
        f"/ip6/fe80::1%eth0/tcp/1/p2p/{PEER}",
    ],
)
def test_address_is_accepted_when_it_names_a_peer(address):
    assert Invite(run_id="r", run_digest="0" * 64, addresses=(address,)).addresses == (address,)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "/ip4/127.0.0.1/tcp/31337",
        f"/p2p/{PEER}",
        f"ip4/127.0.0.1/tcp/1/p2p/{PEER}",
        f"/ip4/127.0.0.1/tcp/1/p2p/{PEER}0",
        "/ip4/127.0.0.1/tcp/1/p2p/short",
        f"/ip4/127.0.0.1 /tcp/1/p2p/{PEER}",
        f"/ip4/127.0.0.1/tcp/1/p2p/{PEER}\n",
        "/" + "x" * 300 + f"/p2p/{PEER}",
    ],
)
def test_address_is_refused_when_nobody_could_be_verified_there(address):
    with pytest.raises(ValidationError):
        Invite(run_id="r", run_digest="0" * 64, addresses=(address,))


CONTENT = INVITE.model_dump(mode="json")
ASK = "ask the organizer for another one"
DAMAGED = "this invite is damaged or cut short; copy the whole line once more"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "the invite is empty; paste the whole line that begins with p2ptrain:"),
        (" \n\t", "the invite is empty; paste the whole line that begins with p2ptrain:"),
        (
            "https://example.org/\x1b[2J" + "x" * 9000,
            r"'https://example.org/\x1b[2J' is not how an invite begins; "
            "paste the whole line from p2ptrain: on",
        ),
        ("p2ptrain:", DAMAGED),
        ("p2ptrain:" + "A" * 100_000, DAMAGED),
        ("p2ptrain:ä" + encode(INVITE)[10:], DAMAGED),
        (
            sealed(json.dumps(CONTENT | {"version": 2, "signature": "00"}).encode()),
            "this invite is of version 2, newer than 1; upgrade p2ptrain",
        ),
        (
            sealed(json.dumps(CONTENT | {"addresses": []}).encode()),
            f"this invite names no address, so there is nobody to reach by it; {ASK}",
        ),
        (
            sealed(json.dumps(CONTENT | {"addresses": [ADDRESS, "/ip4/127.0.0.1"]}).encode()),
            f"this invite has an address (number 2) that is not one of a peer: /…/p2p/<peer id>; {ASK}",
        ),
        (
            sealed(json.dumps(CONTENT | {"run_digest": "00"}).encode()),
            f"this invite was not made by p2ptrain: its 'run_digest' is not valid; {ASK}",
        ),
        (
            sealed(json.dumps(CONTENT | {"evil\x1b" + "x" * 900: 1}).encode()),
            r"this invite was not made by p2ptrain: its 'evil\x1b" + "x" * 35 + f"' is not valid; {ASK}",
        ),
        (
            sealed(json.dumps(CONTENT | {"version": True}).encode()),
            f"this invite was not made by p2ptrain: its 'version' is not valid; {ASK}",
        ),
        (
            sealed(b"[" * 5000),
            f"this invite was not made by p2ptrain: it holds no JSON of ours; {ASK}",
        ),
        (
            sealed(b"\xff"),
            f"this invite was not made by p2ptrain: it holds no JSON of ours; {ASK}",
        ),
    ],
    ids=[
        "empty", "blank", "foreign", "bare", "huge", "umlaut", "newer", "no address", "bad address",
        "bad digest", "unknown key", "bad version", "deep", "binary",
    ],
)  # fmt: skip
def test_invite_is_refused_in_one_sentence_when_it_is_none(text, sentence):
    assert refusal(text) == sentence
