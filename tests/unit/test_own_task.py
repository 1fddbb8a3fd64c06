"""People's own tasks: run only where the volunteer has allowed their package, and held to the interface."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from p2ptrain.config import OwnTask, PeerConfig, RunConfig, load_peer, load_run
from p2ptrain.errors import ConfigError
from p2ptrain.tasks import build_task
from p2ptrain.tasks.own import CheckedTask

README = (Path(__file__).parents[2] / "p2ptrain/tasks/README.md").read_text()
ALLOWED = PeerConfig(allow_tasks=("toys",))

Install = Callable[[str], None]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes a module `toys` of this source importable, until the test is over."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toys", raising=False)

    def install(source: str) -> None:
        (tmp_path / "toys.py").write_text(source)

    return install


def example() -> str:
    return next(iter(re.findall(r"```python\n(.*?)```", README, flags=re.S)))


def built(peer: PeerConfig = ALLOWED, factory: str = "toys:make", **settings: float) -> CheckedTask:
    task = build_task(RunConfig(task=OwnTask(factory=factory, settings=settings)), peer)
    assert isinstance(task, CheckedTask)
    return task


# -- the example of the README -------------------------------------------------------------------------------


def test_example_of_the_readme_learns_what_it_is_for(install: Install, tmp_path: Path) -> None:
    install(example())
    (said,) = re.findall(r"```toml\n(.*?)```", README, flags=re.S)
    both = [line.partition(" # ") for line in said.splitlines()]
    (tmp_path / "run.toml").write_text("\n".join(run for run, _, _ in both))
    (tmp_path / "peer.toml").write_text("\n".join(peer for _, _, peer in both if "=" in peer))
    run = load_run(tmp_path / "run.toml")
    task = build_task(run, load_peer(tmp_path / "peer.toml"))

    model = task.build_model(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    before = task.evaluate(model)["loss"]
    for step in range(200):
        optimizer.zero_grad()
        (task.loss_sum(model, task.batch(step, "alice", 0, 32)) / 32).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert task.evaluate(model)["loss"] < 0.35 < 0.5 < before
    assert task.preview(model, "", 0, torch.Generator().manual_seed(0)).endswith(("inside", "outside"))
    assert torch.equal(task.batch(3, "bob", 4, 2)[0], task.batch(3, "bob", 0, 6)[0][4:])
    assert task.size == 0  # it numbers none


def test_entry_point_stands_for_its_factory(install: Install, tmp_path: Path) -> None:
    install(example())
    info = tmp_path / "toys-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[p2ptrain.tasks]\ncircle = toys:make\n")
    assert built(factory="circle").batch(0, "alice", 0, 2)[0].shape == (2, 2)
    with pytest.raises(
        ConfigError, match=r"no installed package has a task 'square' \(circle\); install the"
    ):
        built(factory="square")
    with pytest.raises(ConfigError, match="code of the package 'toys' \\(circle\\)"):
        built(PeerConfig(), factory="circle")


# -- what is never run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("allowed", [(), ("toy", "toys_more", "make")])
def test_nothing_is_imported_when_the_package_is_not_allowed(
    install: Install, allowed: tuple[str, ...]
) -> None:
    install("raise SystemExit('this was run')")
    with pytest.raises(ConfigError, match=r'set allow_tasks = \["toys"\] in the peer file$'):
        built(PeerConfig(allow_tasks=allowed))
    assert "toys" not in sys.modules


@pytest.mark.parametrize(
    "factory", ["../toys:make", "toys:make()", "toys:", ":make", "a b", "toys:make:more"]
)
def test_run_file_is_refused_when_its_factory_is_no_name(factory: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(f'[task]\nkind = "own"\nfactory = "{factory}"')
    with pytest.raises(ConfigError, match=r"task.factory in .* must be text like \"package.module:factory\""):
        load_run(tmp_path / "run.toml")


# -- what is said of a task that does wrong ------------------------------------------------------------------


WRONGS = {
    "import": (
        "import torch\n",
        "import torch_but_misspelt\n",
        "could not be built: ModuleNotFoundError: No module named",
    ),
    "factory": (
        "radius=settings",
        "radius=1 / 0 + settings",
        r"could not be built: ZeroDivisionError: .*toys.py, line 1\d",
    ),
    "no factory": ("def make(", "def produce(", "could not be built: AttributeError: "),
    "note": (
        'shared_note = ""',
        'shared_note = "\\n"',
        "note must be one line of at most 200 characters, but is",
    ),
    "model": (
        "return nn.Sequential(nn",
        "return (nn",
        "build_model must return a torch.nn.Module, but is",
    ),
    "mean": (
        'reduction="sum"',
        'reduction="none"',
        "loss_sum must return a scalar tensor that depends on the model's parameters, but is",
    ),
    "no loss": (
        "return F.binary",
        "F.binary",
        "loss_sum must return .* parameters, but is None",
    ),
    "shape": (
        "model(points)[:, 0], inside",
        "model(points), inside",
        "could not compute its loss: ValueError",
    ),
    "figures": (
        '"loss": self',
        '"los": self',
        'evaluate must return floats by name, with a "loss", but is',
    ),
}


@pytest.mark.parametrize("wrong", WRONGS)
def test_task_is_named_with_what_it_does_wrong(install: Install, wrong: str) -> None:
    old, new, said = WRONGS[wrong]
    assert old in example()
    install(example().replace(old, new))

    def use() -> None:
        task = built()
        model = task.build_model(0)
        task.loss_sum(model, task.batch(0, "alice", 0, 4))
        task.evaluate(model)

    with pytest.raises(ConfigError, match=said) as caught:
        use()
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("tell its author")


@pytest.mark.parametrize("full", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()], ids=repr)
def test_too_little_memory_is_no_fault_of_the_task_but_where_its_model_is_built(
    install: Install, full: Exception
) -> None:
    """Where samples go through the model, whoever asked for it may ask for fewer at once."""
    install(example())
    task = built()
    model = task.build_model(0)

    def fill(*arguments: object) -> NoReturn:
        raise full

    model.register_forward_pre_hook(fill)
    batch = task.batch(0, "alice", 0, 4)
    for use in (lambda: task.loss_sum(model, batch), lambda: task.evaluate(model)):
        with pytest.raises(type(full)):
            use()
    install(example().replace("return nn.Sequential(nn", "raise MemoryError\n        return (nn"))
    del sys.modules["toys"]
    with pytest.raises(ConfigError, match="could not build its model: MemoryError"):
        built().build_model(0)
