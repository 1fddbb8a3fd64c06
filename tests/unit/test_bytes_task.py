import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from p2ptrain import config
from p2ptrain.config import PeerConfig, RunConfig
from p2ptrain.errors import ConfigError
from p2ptrain.tasks import build_task
from p2ptrain.tasks.bytes import GROUP_ROWS, BytesTask, group_rows, rotate, rotation

TINY = config.BytesTask(layers=2, width=32, heads=2, context=24)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny() -> BytesTask:
    return BytesTask(TINY, 7, "stdlib")


# -- samples -------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(first=st.integers(0, 2**40), a=st.integers(1, 20), b=st.integers(1, 20))
def test_batch_gives_a_sample_the_same_bytes_however_many_are_drawn_at_once(tiny, first, a, b):
    parts = [tiny.batch(3, "alice", first, a), tiny.batch(3, "alice", first + a, b)]
    assert torch.equal(torch.cat(parts), tiny.batch(3, "alice", first, a + b))


def test_batch_is_the_same_on_every_machine(tmp_path):
    (tmp_path / "text").write_bytes(bytes(range(1, 251)) * 2)
    task = BytesTask(TINY, 7, str(tmp_path / "text"))
    # Written down once: peers of different versions must draw alike, or a run could not be audited.
    assert task.batch(3, "alice", 0, 4)[:, 0].tolist() == [216, 28, 225, 57]


@pytest.mark.parametrize(
    ("seed", "step", "peer", "first"), [(8, 3, "a", 0), (7, 4, "a", 0), (7, 3, "b", 0), (7, 3, "a", 9)]
)
def test_batch_differs_when_seed_step_peer_or_number_does(tiny, seed, step, peer, first):
    other = BytesTask(TINY, seed, "stdlib").batch(step, peer, first, 8)
    assert not torch.equal(other, tiny.batch(3, "a", 0, 8))


def test_batch_reaches_every_window_of_the_training_text_and_no_byte_held_out(tmp_path):
    # 60 bytes to train on, each one of a kind; windows of 25 begin at 0 … 35.
    (tmp_path / "text").write_bytes(bytes(range(100)[40:]) + b"\xff" * 60)
    task = BytesTask(TINY.model_copy(update={"holdout": 0.5}), 7, str(tmp_path / "text"))
    batch = task.batch(0, "alice", 0, 2_000)
    assert batch.shape == (2_000, 25)
    assert batch.dtype == torch.int64
    assert torch.equal(batch.diff(dim=1), torch.ones(2_000, 24, dtype=torch.int64))
    assert set(batch[:, 0].tolist()) == set(range(40, 76))


def test_samples_lie_side_by_side_and_are_all_of_the_text_but_an_incomplete_window(tmp_path):
    (tmp_path / "text").write_bytes(bytes(range(100)[40:]) + b"\xff" * 60)  # 60 bytes to train on
    task = BytesTask(TINY.model_copy(update={"holdout": 0.5}), 7, str(tmp_path / "text"))
    assert task.size == 2
    assert task.samples([1, 0]).tolist() == [list(range(64, 89)), list(range(40, 65))]


def test_training_and_heldout_windows_share_no_text_when_files_are_held_out(tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.txt").write_bytes(bytes([100 + number]) * 200)
    task = BytesTask(TINY.model_copy(update={"holdout": 0.2}), 7, str(tmp_path))
    seen: list[Tensor] = []

    class Recorder(nn.Module):
        def forward(self, text: Tensor) -> Tensor:
            seen.append(text)
            return torch.zeros(*text.shape, 256)

    task.evaluate(Recorder())
    heldout = set(torch.cat(seen).flatten().tolist()) - {ord("\n")}
    trained = set(task.batch(0, "alice", 0, 2_000).flatten().tolist()) - {ord("\n")}
    assert len(heldout) > 3
    assert len(trained) > 25
    assert not heldout & trained


# -- the loss ------------------------------------------------------------------------------------------------


def gradient(task: BytesTask, model: nn.Module, batch: Tensor) -> Tensor:
    model.zero_grad()
    task.loss_sum(model, batch).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def test_gradient_of_a_pooled_batch_is_the_sum_over_its_parts(tiny):
    model = tiny.build_model(0).double()
    parts = [tiny.batch(0, "alice", 0, 3), tiny.batch(0, "alice", 3, 5), tiny.batch(0, "bob", 0, 1)]
    together = gradient(tiny, model, torch.cat(parts))
    apart = sum(gradient(tiny, model, part) for part in parts)
    assert together.dtype == torch.float64
    assert together.norm() > 0.1
    assert (together - apart).abs().max() < 1e-10


def test_loss_sum_is_the_sum_over_samples_of_the_mean_over_bytes(tiny):
    model = tiny.build_model(0)
    batch = tiny.batch(0, "alice", 0, 3)
    expected = 0.0
    for window in batch:
        logits = model(window[None, :-1])[0].log_softmax(-1)
        expected -= sum(logits[t, window[t + 1]].item() for t in range(24)) / 24
    loss = tiny.loss_sum(model, batch)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", [TINY, config.BytesTask()])
def test_first_loss_is_that_of_not_knowing(shape):
    task = BytesTask(shape, 0, "stdlib")
    assert task.evaluate(task.build_model(0))["loss"] == pytest.approx(math.log(256), abs=0.3)


def test_a_few_steps_reduce_the_heldout_loss(tiny):
    model = tiny.build_model(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    before = tiny.evaluate(model)["loss"]
    for step in range(20):
        optimizer.zero_grad()
        (tiny.loss_sum(model, tiny.batch(step, "alice", 0, 8)) / 8).backward()
        optimizer.step()
    assert tiny.evaluate(model)["loss"] < before - 1


def test_evaluate_gives_the_same_figures_each_time_and_bits_for_nats(tiny):
    model = tiny.build_model(0)
    figures = tiny.evaluate(model)
    assert tiny.evaluate(model) == figures
    assert figures["bits_per_byte"] == pytest.approx(figures["loss"] / math.log(2))
    assert 1.5 < figures["zlib_bits_per_byte"] < 3
    assert all(parameter.grad is None for parameter in model.parameters())


# -- the model -----------------------------------------------------------------------------------------------


def test_model_is_the_same_when_the_seed_is_and_leaves_other_randomness_alone(tiny):
    torch.manual_seed(1)
    one = tiny.build_model(5).state_dict()
    torch.manual_seed(2)
    same, other = tiny.build_model(5).state_dict(), tiny.build_model(6).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["bytes.weight"], other["bytes.weight"])


def test_model_is_float32_without_buffers_and_within_its_budget():
    model = BytesTask(config.BytesTask(), 0, "stdlib").build_model(0)
    assert list(model.buffers()) == []
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert 700_000 < sum(parameter.numel() for parameter in model.parameters()) < 900_000


def test_model_never_looks_ahead(tiny):
    model = tiny.build_model(0).double()
    text = tiny.batch(0, "alice", 0, 1)[:, :-1]
    changed = text.clone()
    changed[0, 15] = (changed[0, 15] + 1) % 256
    difference = (model(text) - model(changed)).abs().amax(dim=-1)[0]
    assert difference[:15].max() == 0
    assert difference[15:].min() > 0


def test_model_reads_a_text_alone_as_it_does_in_a_batch(tiny):
    model = tiny.build_model(0).double()
    texts = tiny.batch(0, "alice", 0, 4)
    assert torch.allclose(model(texts)[2:3], model(texts[2:3]), atol=1e-12)


def test_rotation_makes_products_depend_on_distance_alone():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    turn = rotation(20, 8, query)
    products = rotate(query.expand(20, 8), turn) @ rotate(key.expand(20, 8), turn).T
    for distance in range(-10, 11):
        diagonal = products.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-12)
    assert products[0, 0] == pytest.approx((query @ key).item())
    assert products[0].unique().numel() == 20


def test_group_rows_name_the_last_bytes_in_plain_integers():
    text = b"\xff\xfe\xfd\xfc\x00\x07"
    rows = group_rows(torch.tensor([list(text)]))[0].tolist()
    for end, row in enumerate(rows):
        for length, found in zip((2, 3, 4), row, strict=True):
            group = (b"\0" * 3 + text)[end + 4 - length : end + 4]
            packed = int.from_bytes(group, "big")
            assert found == packed * 1_103_515_245 % (2**31 - 1) % GROUP_ROWS


def test_group_rows_spread_over_the_table_when_the_text_is_real():
    rows = group_rows(BytesTask(config.BytesTask(), 0, "stdlib").batch(0, "alice", 0, 200)[:, :-1])
    for column in rows.unbind(-1):
        groups = column.flatten().bincount(minlength=GROUP_ROWS)
        assert (groups > 0).float().mean() > 0.3  # 25,600 groups, but real text repeats itself


# -- preview -------------------------------------------------------------------------------------------------


def written(task: BytesTask, prompt: str, length: int, seed: int = 0, temperature: float = 0.7) -> str:
    return task.preview(task.build_model(0), prompt, length, torch.Generator().manual_seed(seed), temperature)


class Favours(nn.Module):
    """Gives one byte logit `size`, all others 0."""

    def __init__(self, byte: int, size: float) -> None:
        super().__init__()
        self.logits = torch.zeros(256)
        self.logits[byte] = size

    def forward(self, text: Tensor) -> Tensor:
        assert text.shape[1] <= TINY.context
        return self.logits.expand(*text.shape, 256)


def test_preview_begins_with_the_prompt_and_repeats_when_the_seed_does(tiny):
    text = written(tiny, "def ", 40)
    assert text.startswith("def ")
    assert text == written(tiny, "def ", 40)
    assert text != written(tiny, "def ", 40, seed=1)


@pytest.mark.parametrize("prompt", ["", "x", "xy", "xyz"])
def test_preview_goes_on_when_the_prompt_is_shorter_than_the_longest_group(tiny, prompt):
    assert written(tiny, prompt, 5).startswith(prompt or "\n")


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 0.7])
def test_preview_writes_what_the_model_favours(tiny, temperature):
    text = tiny.preview(Favours(ord("x"), 100.0), "a" * 50, 60, torch.Generator(), temperature)
    assert text == "a" * 50 + "x" * 60


def test_preview_blurs_when_the_temperature_rises(tiny):
    def share(temperature: float) -> float:
        model, chance = Favours(ord("x"), 5.0), torch.Generator().manual_seed(0)
        return tiny.preview(model, "\n", 400, chance, temperature).count("x") / 400

    assert share(0.5) > 0.9 > share(1.0) > 0.2 > share(3.0)


def test_preview_starts_on_a_new_line_when_the_prompt_is_empty(tiny):
    assert tiny.preview(Favours(ord("x"), 100.0), "", 3, torch.Generator()) == "\nxxx"


def test_preview_shows_bytes_that_are_no_text(tiny):
    assert tiny.preview(Favours(0xFF, 100.0), "\ud800", 2, torch.Generator()) == "?\ufffd\ufffd"


# -- the factory ---------------------------------------------------------------------------------------------


def test_build_task_reads_the_standard_library_when_the_run_says_so():
    run = RunConfig()
    assert build_task(run).note == BytesTask(run.task, run.seed, "stdlib").note


def test_build_task_reads_this_peers_own_text_when_it_has_one(tmp_path):
    (tmp_path / "text").write_bytes(b"a text of my own. " * 1000)
    own = build_task(RunConfig(), PeerConfig(corpus=str(tmp_path / "text")))
    assert own.note != build_task(RunConfig()).note
    assert len(own.note) <= 200  # what a presence record has room for


def test_build_task_never_opens_a_path_that_the_run_names(tmp_path):
    (tmp_path / "diary").write_bytes(b"something private. " * 1000)
    run = RunConfig(task=config.BytesTask(corpus=str(tmp_path / "diary")))
    with pytest.raises(ConfigError, match="opens no path that another peer wrote; set corpus in"):
        build_task(run)
