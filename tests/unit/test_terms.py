"""Live changes to a run: what holds at which step, that lineages bind it, and how the organizer says it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from organizer import NOBODY, ORGANIZER, invite
from replicas import next_entry, small_replica, small_run
from typer.testing import CliRunner, Result

from p2ptrain.config import AnyTask, BytesTask, CausalLmTask, DigitsTask, Local, OwnTask, RunConfig
from p2ptrain.errors import BadMessage, ConfigError
from p2ptrain.protocol.lineage import advance, canonical
from p2ptrain.protocol.round import Rules
from p2ptrain.protocol.terms import due, in_force, in_words, most_samples, newest, rules_at, total_steps
from p2ptrain.records import Change, PeerId, Terms
from p2ptrain.replica.log import Entry
from p2ptrain.swarm.access import decode
from p2ptrain.swarm.gate import UNSIGNED, Gate, signed
from peers import invites, present
from peers.cli import app

ME = PeerId("me")


def terms(*changes: Change, revision: int = 1, **more: object) -> Terms:
    return Terms.model_validate(
        {"peer": ME, "revision": revision, "signature": UNSIGNED, "changes": changes, **more}
    )


def lr(step: int, value: float) -> Change:
    return Change(step=step, key="optimizer.lr", value=value)


def under(entry: Entry, said: Terms | None) -> Entry:
    return Entry(entry.header.model_copy(update={"terms": said}), entry.payload)


@pytest.mark.parametrize(
    "task",
    [BytesTask(), DigitsTask(), CausalLmTask(), OwnTask(settings={"radius": 0.6, "name": "toys"})],
    ids=lambda task: task.kind,
)
def test_changes_hold_whatever_the_run_trains(task: AnyTask) -> None:
    run = RunConfig(task=task)
    assert in_force(run, None, 7) is run
    assert in_force(run, terms(lr(5, 0.5)), 7) == run.model_copy(
        update={"optimizer": run.optimizer.model_copy(update={"lr": 0.5})}
    )
    assert hash(run) == hash(RunConfig.model_validate(run.model_dump()))


# -- what holds when -----------------------------------------------------------------------------------------


def test_change_holds_from_its_step_on_and_a_later_one_replaces_it() -> None:
    said = terms(lr(20, 0.2), lr(10, 0.1), Change(step=10, key="target_batch_size", value=48))
    assert due(said, 9) == []
    assert in_force(RunConfig(), said, 9) == RunConfig()
    at_10, at_20 = (in_force(RunConfig(), said, step) for step in (10, 25))
    assert (at_10.optimizer.lr, at_10.target_batch_size) == (0.1, 48)
    assert (at_20.optimizer.lr, at_20.target_batch_size) == (0.2, 48)
    assert isinstance(at_20.target_batch_size, int)


def test_change_that_makes_no_valid_run_is_refused() -> None:
    with pytest.raises(ValueError, match="lr"):
        in_force(RunConfig(), terms(lr(0, 1000.0)), 0)
    replica = small_replica()
    before = replica.position
    with pytest.raises(BadMessage, match="no valid run"):
        replica.apply(under(next_entry(replica), terms(lr(0, 1000.0))))
    assert replica.position == before


def test_terms_of_the_highest_revision_count_and_the_run_ends_as_they_say() -> None:
    old, new = terms(revision=1), terms(revision=2, stop=70)
    assert newest(old, None, new) is new
    assert newest(None, None) is None
    run = RunConfig(total_steps=100)
    assert [total_steps(run, each) for each in (None, old, new, terms(stop=1000))] == [100, 100, 70, 100]


def small_rules(**fields: int) -> Rules:
    return Rules(
        **fields,
        min_peers=1,
        max_peers=4,
        values=10,
        encoded_bytes=40,
        heartbeat_seconds=1.0,
        silence_seconds=5.0,
        silence_most_seconds=60.0,
        attempt_most_seconds=60.0,
    )


def test_what_a_peer_may_bring_allows_for_those_who_have_not_heard() -> None:
    rules = small_rules(target_batch_size=64)
    said = terms(Change(step=10, key="target_batch_size", value=16), revision=1)
    assert rules_at(rules, said, 9).target_batch_size == 64
    assert rules_at(rules, said, 10).target_batch_size == 16
    assert most_samples(rules, said, None) == 128
    assert most_samples(rules, terms(Change(step=10, key="target_batch_size", value=500)), said) == 1000


def test_target_is_that_of_the_warm_up_whatever_is_changed_until_it_is_over() -> None:
    local = RunConfig(
        strategy="local", local=Local(warmup_rounds=3, warmup_batch_size=8), target_batch_size=96
    )
    said = terms(Change(step=1, key="target_batch_size", value=64))
    targets = [in_force(local, said, step).target_batch_size for step in range(5)]
    assert targets == [8, 8, 8, 64, 64]
    assert [in_force(local, None, step).strategy for step in (2, 3)] == ["sync", "local"]
    rules = small_rules(target_batch_size=96, warmup_rounds=3, warmup_batch_size=8)
    assert [rules_at(rules, said, step).target_batch_size for step in range(5)] == targets


# -- replicas ------------------------------------------------------------------------------------------------


def test_entry_is_applied_under_its_own_terms_whatever_a_replica_has_heard() -> None:
    """The learning rate of the step is the header's: replayed entries give the same bits."""
    said = terms(lr(1, 0.05), Change(step=2, key="optimizer.weight_decay", value=0.5))
    log: list[Entry] = []
    first = small_replica()
    for held in (None, said, said, said):
        log.append(under(next_entry(first), held))
        first.apply(log[-1])
    replayed = small_replica()
    for entry in log:
        replayed.apply(entry)
    assert torch.equal(first.parameters, replayed.parameters)
    assert first.position == replayed.position
    other = small_replica()
    for entry in log:
        # The same gradients without the change lead elsewhere, in parameters and lineage alike.
        parent = {"parent": other.position.lineage}
        other.apply(under(Entry(entry.header.model_copy(update=parent), entry.payload), None))
    assert not torch.equal(first.parameters, other.parameters)
    assert other.position.lineage != first.position.lineage


def test_learning_rate_of_a_changed_run_is_that_of_a_run_that_was_always_so() -> None:
    changed, always = small_replica(), small_replica(small_run(optimizer={"lr": 0.02}))
    entry = next_entry(changed)
    changed.apply(under(entry, terms(lr(0, 0.02))))
    always.apply(entry)
    assert torch.equal(changed.parameters, always.parameters)


def test_lineage_binds_the_terms_but_not_who_passed_them_on() -> None:
    replica = small_replica()
    header = next_entry(replica).header

    def leads_to(said: Terms | None) -> str:
        return advance(replica.position, header.model_copy(update={"terms": said})).lineage

    said = terms(lr(0, 0.1))
    assert len({leads_to(None), leads_to(said), leads_to(terms(lr(0, 0.2)))}) == 3
    assert leads_to(said) == leads_to(said.model_copy(update={"peer": PeerId("another")}))
    assert b"terms" not in canonical(header)  # a run that is not changed has the lineage it always had


# -- the organizer's word ------------------------------------------------------------------------------------


def test_only_what_the_organizer_signed_for_this_run_is_lawful_and_newer_counts() -> None:
    here = invite()
    gate = Gate(here.shown_by(ME), ME)
    genuine = signed(ORGANIZER, here.run_id, terms(lr(9, 0.1)))
    assert gate.lawful(genuine)
    assert not gate.lawful(terms(lr(9, 0.1)))
    assert not gate.lawful(genuine.model_copy(update={"changes": (lr(9, 0.2),)}))
    assert not gate.lawful(signed(ORGANIZER, "another", terms(lr(9, 0.1))))
    assert gate.learn(genuine)
    assert gate.learn(signed(ORGANIZER, here.run_id, terms(revision=0)))
    assert gate.terms == genuine


# -- the command ---------------------------------------------------------------------------------------------


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a bootstrap that has been started once, and has seen a peer at step 100."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    invites.open_book(tmp_path, RunConfig(), [f"/ip4/127.0.0.1/tcp/1/p2p/{NOBODY}"], None, 0)
    seen = present.Seen(peer="p", name="", role="train", invite=1, at=0, step=100)
    present.write(tmp_path, [seen])
    return tmp_path


def run(folder: Path, *words: str) -> Result:
    command = ["run", *words, "--data-dir", str(folder)]
    return CliRunner().invoke(app, command, catch_exceptions=False)


def held(folder: Path) -> Terms | None:
    return invites.read(folder).terms


def test_setting_is_shown_dry_then_signed_with_the_next_revision(opened: Path) -> None:
    shown = run(opened, "set", "optimizer.lr=2e-4", "--at-step", "500", "--dry-run")
    assert "+ optimizer.lr = 0.0002 from step 500" in shown.output
    assert "nothing was changed" in shown.output
    assert held(opened) is None
    run(opened, "set", "optimizer.lr=2e-4", "--at-step", "500")
    run(opened, "set", "target_batch_size=32")
    said = held(opened)
    assert said is not None
    assert said.revision == 2
    assert [(each.key, each.value, each.step) for each in said.changes] == [
        ("optimizer.lr", 2e-4, 500),
        ("target_batch_size", 32.0, 150),
    ]
    told = json.loads(run(opened, "show", "--json").output)
    assert (told["run_id"], told["step"], told["terms"]["revision"]) == (RunConfig().run_id, 100, 2)
    assert "optimizer.lr = 0.0002 from step 500" in run(opened, "show").output


def test_run_is_paused_resumed_and_stopped(opened: Path) -> None:
    run(opened, "pause", "--reason", "new data")
    said = held(opened)
    assert said is not None
    assert said.paused == "new data"
    assert "training is paused from step 0 (new data)" in run(opened, "show").output
    run(opened, "stop", "--at-step", "900")
    run(opened, "resume")
    said = held(opened)
    assert said is not None
    assert (said.paused, said.stop, said.revision) == (None, 900, 3)
    assert in_words(said) == ["the run is over at step 900"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("set", "seed=3"), "cannot change while a run goes on; these can: optimizer.lr"),
        (("set", "optimizer.lr"), "expected optimizer.lr=NUMBER"),
        (("set", "optimizer.lr=fast"), "expected optimizer.lr=NUMBER"),
        (("set", "optimizer.lr=nan"), "expected optimizer.lr=NUMBER"),
        (("set", "target_batch_size=1.5"), "expected target_batch_size=NUMBER"),
        (("set", "optimizer.lr=100"), "the run would not be valid: optimizer"),
        (("set", "target_batch_size=0"), "the run would not be valid: target_batch_size"),
        (
            ("set", "optimizer.lr=0.1", "--at-step", "100"),
            "is past: .*at step 100",
        ),
        (("resume",), "the run is not paused"),
        (("pause", "--reason", "x" * 81), "at most 80 characters"),
        (("stop", "--at-step", "5"), "is past"),
    ],
)
def test_order_that_cannot_be_is_refused_and_changes_nothing(
    opened: Path, words: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        run(opened, *words)
    assert held(opened) is None


def test_run_that_nobody_was_seen_in_needs_a_step_to_begin_at(opened: Path) -> None:
    present.write(opened, [])
    with pytest.raises(ConfigError, match="say from which step on"):
        run(opened, "set", "optimizer.lr=0.1")
    run(opened, "set", "optimizer.lr=0.1", "--at-step", "3")


def test_changes_that_are_past_and_replaced_make_room(opened: Path) -> None:
    for step in range(101, 117):
        run(opened, "set", f"optimizer.lr=0.{step}", "--at-step", str(step))
    with pytest.raises(ConfigError, match="16 changes are ahead already"):
        run(opened, "set", "optimizer.lr=0.9", "--at-step", "200")
    seen = present.Seen(peer="p", name="", role="train", invite=1, at=0, step=150)
    present.write(opened, [seen])
    run(opened, "set", "optimizer.lr=0.9", "--at-step", "200")
    said = held(opened)
    assert said is not None
    assert [each.step for each in said.changes] == [116, 200]


def test_terms_are_signed_anew_by_the_organizers_next_key_and_count_as_before(opened: Path) -> None:
    run(opened, "set", "optimizer.lr=0.1", "--at-step", "200")
    before = held(opened)
    book = invites.rotate(opened, RunConfig(), [], ends=10, now=0)
    after = book.terms
    assert before is not None
    assert after is not None
    assert (after.revision, after.changes) == (2, before.changes)
    link = book.link(RunConfig())
    assert link is not None
    newcomer = Gate(decode(link.line).shown_by(ME), ME)
    assert newcomer.lawful(after)
    assert not newcomer.lawful(before)  # until it hears of the succession
    assert book.succession is not None
    newcomer.learn(book.succession)
    assert newcomer.lawful(before)
