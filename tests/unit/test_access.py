"""The invite: it comes through mail and chat whole, or is refused in a sentence; nobody but its organizer can
change what it allows. Not covered: what peers make of it, see `test_gate`."""

import base64
import json
import string
import zlib
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from organizer import NOW, ORGANIZER, invite
from pydantic import ValidationError

from p2ptrain.errors import InviteError
from p2ptrain.records import Grant
from p2ptrain.swarm.access import MAX_INVITE_CHARACTERS, check, decode, encode, is_signed, issue
from p2ptrain.swarm.identity import of_seed

PEER = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
ADDRESS = f"/ip4/127.0.0.1/tcp/31337/p2p/{PEER}"
INVITE = invite([ADDRESS], run_id="tiny", run_digest="0f" * 32)

BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
addresses = st.builds(
    "/{}/{}/tcp/{}/p2p/{}".format,
    st.sampled_from(["ip4", "ip6", "dns4"]),
    st.text("0123456789abcdef.:", min_size=1, max_size=40),
    st.integers(0, 65535),
    st.text(BASE58, min_size=46, max_size=52),
)
invites = st.builds(
    issue,
    st.binary(min_size=32, max_size=32).map(of_seed),
    role=st.sampled_from(["train", "serve", "watch"]),
    serial=st.integers(0, 2**31 - 1),
    issued=st.integers(0, 2**40 - 1),
    expires=st.none() | st.integers(0, 2**40 - 1),
    name=st.text(max_size=64),
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


places = st.integers(0, 9999)
"""Drawn so, since the text of an invite, signed and with a fresh key, is another one each time."""


@given(invite=invites)
def test_invite_comes_back_when_decoded(invite):
    text = encode(invite)
    assert set(text) <= set(string.ascii_letters + string.digits + "-_:")
    assert decode(text) == invite


@given(invite=invites, data=st.data())
def test_invite_is_refused_when_one_character_changed(invite, data):
    text = encode(invite)
    place = data.draw(places) % len(text)
    other = data.draw(st.characters())
    assume(other != text[place])
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
        place = data.draw(places) % (len(text) + 1)
        text = text[:place] + data.draw(st.sampled_from(["\n", "\r\n", " ", "\n\t"])) + text[place:]
    assert decode(f"  {text} \n") == invite


def test_invite_stays_readable_when_p2ptrain_changes():
    """Once invites of version 2 are out in the world, this one must be readable for ever."""
    golden = (
        "p2ptrain:eyJ2ZXJzaW9uIjoyLCJncmFudCI6eyJydW5faWQiOiJ0aW55IiwicnVuX2RpZ2VzdCI6IjBmMGYwZjBmMGYwZ"
        "jBmMGYwZjBmMGYwZjBmMGYwZjBmMGYwZjBmMGYwZjBmMGYwZjBmMGYwZjBmMGYwZjBmMGYiLCJvcmdhbml6ZXIiOiIxMkQ"
        "zS29vV1BKazdhb0dUZmdhSG1paEdMdFJaU044SHB0UzNxSmJWZlF5Y1lXa2lXUDRyIiwia2V5IjoiMTJEM0tvb1dCNThkQ"
        "Vc5bVpOM0dIcUgxSG9BejdGTkZ3WlE4RzNaRnhHbmVaTDE3S2dvMyIsInJvbGUiOiJ0cmFpbiIsInNlcmlhbCI6MSwibmF"
        "tZSI6ImdvbGRlbiIsImlzc3VlZCI6MCwiZXhwaXJlcyI6MTgwMDAwMDAwMH0sInNpZ25hdHVyZSI6IjY5NWMyMTY1ZjE4N"
        "zY2YzVmZTkxYThjMGExMjZmMzY3NWE0YzA2ZjM3NjQ0MjY2MjQxOGZhNGUxYTQzZTYxNjQwMzIwZjRmYTJjYTVmZmY1YWQ"
        "2NzFkMzgxMGQyYWI3NGU3NjljYWVlYmU2MTg4ZDg5ZmI0ZDMyYzUzNzFlYzA1Iiwic2VjcmV0IjoiNjc2NzY3Njc2NzY3N"
        "jc2NzY3Njc2NzY3Njc2NzY3Njc2NzY3Njc2NzY3Njc2NzY3Njc2NzY3Njc2NzY3Njc2NyIsImFkZHJlc3NlcyI6WyIvaXA"
        "0LzEyNy4wLjAuMS90Y3AvMzEzMzcvcDJwLzEyRDNLb29XRHBKN0FzN0JXQXdSTWZ1MVZVMldDcU5qdnEzODdKRVlLREJqN"
        "Gt4Nm5YVE4iXX2Qe1Wg"
    )
    invite = decode(golden)
    assert encode(invite) == golden
    assert (invite.run_id, invite.run_digest, invite.addresses) == ("tiny", "0f" * 32, (ADDRESS,))
    assert (invite.grant.organizer, invite.grant.role, invite.grant.serial) == (ORGANIZER.peer_id, "train", 1)
    assert (invite.grant.name, invite.grant.issued, invite.grant.expires) == ("golden", 0, NOW)
    assert invite.secret == (b"g" * 32).hex()


def test_largest_invite_fits_when_every_bound_is_reached():
    address = f"/dns4/{'x' * 190}/tcp/31337/p2p/{'Q' * 46}".ljust(256, "x")
    largest = invite(
        (address[:256],) * 8,
        run_id="r" * 63,
        name="\U0001f469" * 64,
        serial=2**31 - 1,
        issued=2**40 - 1,
        expires=2**40 - 1,
    )
    assert len(encode(largest)) < MAX_INVITE_CHARACTERS / 3
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
    assert invite([address]).addresses == (address,)


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
        invite([address])


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
            sealed(json.dumps(CONTENT | {"version": 3, "grants": []}).encode()),
            "this invite is of version 3 and not 2; upgrade p2ptrain",
        ),
        (
            sealed(json.dumps({"version": 1, "run_id": "tiny", "addresses": [ADDRESS]}).encode()),
            f"this invite is of version 1 and not 2; {ASK}",
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
            sealed(json.dumps(CONTENT | {"grant": CONTENT["grant"] | {"run_digest": "00"}}).encode()),
            f"this invite was not made by p2ptrain: its 'run_digest' is not valid; {ASK}",
        ),
        (
            sealed(json.dumps(CONTENT | {"evil\x1b" + "x" * 900: 1}).encode()),
            "this invite was not made by p2ptrain: its 'evil�" + "x" * 34 + f"…' is not valid; {ASK}",
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
        "empty", "blank", "foreign", "bare", "huge", "umlaut", "newer", "older", "no address", "bad address",
        "bad digest", "unknown key", "bad version", "deep", "binary",
    ],
)  # fmt: skip
def test_invite_is_refused_in_one_sentence_when_it_is_none(text, sentence):
    assert refusal(text) == sentence


# -- what only the organizer can change ----------------------------------------------------------------------

CHANGES: dict[str, Any] = {
    "run_id": "another",
    "run_digest": "1" * 64,
    "organizer": of_seed(b"m" * 32).peer_id,
    "key": of_seed(b"m" * 32).peer_id,
    "role": "watch",
    "serial": 2,
    "name": "another",
    "issued": 1,
    "expires": NOW,
    "uses": 3,
}


def test_every_field_of_a_grant_is_tried() -> None:
    assert CHANGES.keys() == Grant.model_fields.keys()


@pytest.mark.parametrize("field", CHANGES)
def test_invite_is_refused_when_a_field_was_changed_by_somebody_else(field: str) -> None:
    changed = INVITE.model_copy(update={"grant": INVITE.grant.model_copy(update={field: CHANGES[field]})})
    assert refusal(encode(changed)).endswith(f"somebody has changed it; {ASK}")


def test_invite_is_refused_when_any_byte_of_its_signature_or_secret_was_changed() -> None:
    for field in ("signature", "secret"):
        right = bytearray.fromhex(getattr(INVITE, field))
        for place in range(len(right)):
            wrong = right.copy()
            wrong[place] ^= 1 << place % 8
            refusal(encode(INVITE.model_copy(update={field: wrong.hex()})))


def test_grant_is_unsigned_when_another_organizer_signed_it() -> None:
    other = invite([ADDRESS], organizer=of_seed(b"m" * 32))
    assert is_signed(other.grant, other.signature)
    assert not is_signed(other.grant.model_copy(update={"organizer": ORGANIZER.peer_id}), other.signature)


def test_addresses_may_be_changed_when_the_bootstrap_is_gone() -> None:
    moved = INVITE.model_copy(update={"addresses": (f"/dns4/example.org/tcp/1/p2p/{PEER}",)})
    assert decode(encode(moved)) == moved


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"expires": NOW},
            "this invite expired at 2027-01-15 08:00:00 UTC, and it is 2027-01-15 08:00:00 UTC",
        ),
        ({"expires": NOW - 3600}, "this invite expired at 2027-01-15 07:00:00 UTC"),
        ({"issued": NOW + 3600}, "this invite is not valid before 2027-01-15 09:00:00 UTC"),
    ],
)
def test_invite_is_refused_at_the_wrong_time_and_the_clock_is_named(
    changes: dict[str, int], words: str
) -> None:
    with pytest.raises(InviteError) as caught:
        check(invite(**changes), NOW)
    assert str(caught.value).startswith(words)
    assert str(caught.value).endswith(f"if that is the wrong time, set the clock, else {ASK}")


def test_invite_holds_between_its_times() -> None:
    check(invite(issued=NOW, expires=NOW + 1), NOW, role="train")
    check(invite(issued=NOW + 10), NOW)  # clocks may differ as much as anywhere else


def test_invite_to_watch_is_refused_for_training() -> None:
    for role in ("watch", "serve"):
        check(invite(role=role), NOW)
        with pytest.raises(InviteError, match=f"for role '{role}' and not for 'train'"):
            check(invite(role=role), NOW, role="train")


def test_secret_is_not_shown_when_an_invite_is_logged() -> None:
    assert INVITE.secret not in repr(INVITE)
