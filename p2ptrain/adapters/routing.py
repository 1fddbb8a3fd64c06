"""A router trained and judged on text files, from adapter folders to the table that is printed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from p2ptrain.adapters import route
from p2ptrain.adapters.combine import combine
from p2ptrain.adapters.files import file_digest, load_adapter, save_adapter
from p2ptrain.adapters.panel import BASE, Panel
from p2ptrain.adapters.routers import Choice, RouterNote, load_router
from p2ptrain.adapters.texts import split, tokenizer_of, windows
from p2ptrain.errors import AdapterError
from p2ptrain.replica.adapter_files import ADAPTER

MERGED = "merged"
Table = dict[str, dict[str, float]]
"""Way of choosing → domain, and `mean` → loss after the prefix, nats per token."""


def trained(
    base: Path,
    adapters: Mapping[str, Path],
    texts: Mapping[str, Path],
    *,
    prefix: int,
    length: int,
    most: int,
    threshold: float | None,
    progress: Callable[[str], None],
) -> tuple[route.Router, RouterNote]:
    """A router among the base and these adapters, learned from four of five windows of each text and judged
    by the others; without a `threshold` the first find it. Raises AdapterError."""
    tokenizer = tokenizer_of(base)
    panel, _ = _panel(base, adapters, merged=None)
    learned: list[route.Scores] = []
    judged: list[route.Scores] = []
    for domain, (name, file) in enumerate(texts.items()):
        progress(f"reading {name}: {len(adapters) + 1} passes over at most {most} windows of {length} tokens")
        for part, scores in zip(
            split(windows(file, tokenizer, length, most)), (learned, judged), strict=True
        ):
            scores.append(panel.scores(part, prefix, domain, len(panel.choices)))
    router = route.train(route.joined(learned), threshold)
    found = route.compare(route.joined(judged), router, len(texts))
    note = RouterNote(
        base=str(base.resolve()),
        adapters=tuple(
            Choice(name=name, path=str(path.resolve()), digest=file_digest(path / ADAPTER))
            for name, path in adapters.items()
        ),
        prefix=prefix,
        threshold=router.threshold,
        domains=tuple(texts),
        confusion=found.confusion,
        table=_table(found, panel.choices, tuple(texts)),
    )
    return router, note


def judged(
    router: route.Router,
    note: RouterNote,
    texts: Mapping[str, Path],
    *,
    length: int,
    most: int,
    progress: Callable[[str], None],
) -> tuple[Table, tuple[tuple[int, ...], ...]]:
    """The table of all ways of choosing on these texts, the adapters' exact mean among them, and the
    confusion matrix. Raises AdapterError."""
    base = Path(note.base)
    tokenizer = tokenizer_of(base)
    adapters = {each.name: Path(each.path) for each in note.adapters}
    with tempfile.TemporaryDirectory(prefix="p2ptrain-") as folder:
        panel, merged = _panel(base, adapters, merged=Path(folder) / MERGED)
    parts, means = [], {}
    for domain, (name, file) in enumerate(texts.items()):
        progress(f"reading {name}: {len(adapters) + 2} passes over at most {most} windows of {length} tokens")
        tokens = windows(file, tokenizer, length, most)
        parts.append(panel.scores(tokens, note.prefix, domain, len(adapters) + 1))
        rest: Tensor = panel.losses(tokens, [merged] * len(tokens))[:, note.prefix - 1 :]
        means[name] = rest.mean().item()
    found = route.compare(route.joined(parts), router, len(texts))
    table = _table(found, panel.choices[:-1], tuple(texts))
    table[MERGED] = {**means, "mean": sum(means.values()) / len(means)}
    return table, found.confusion


@dataclass(frozen=True)
class Written:
    """What a model wrote, and by which choice."""

    text: str
    choice: str
    confidence: float


def write(folder: Path, prompt: str, length: int, temperature: float, seed: int) -> Written:
    """The prompt and at most `length` tokens by the adapter that the router in `folder` chooses for it.

    The same arguments give the same text. Raises AdapterError.
    """
    router, note = load_router(folder)
    base = Path(note.base)
    tokenizer = tokenizer_of(base)
    panel, _ = _panel(base, {each.name: Path(each.path) for each in note.adapters}, merged=None)
    tokens = tokenizer.encode(prompt)
    if not tokens:
        raise AdapterError("--prompt is empty, and the router chooses by it; give some text to go on from")
    features = panel.features(torch.tensor([tokens[: note.prefix]]))
    choice = int(router.choose(features))
    more = panel.write(tokens, choice, length, temperature, seed)
    confidence = float(router.probabilities(features)[0].max())
    return Written(prompt + tokenizer.decode(more), panel.choices[choice], confidence)


def _panel(base: Path, adapters: Mapping[str, Path], merged: Path | None) -> tuple[Panel, int]:
    """With the exact mean of the adapters as the last choice, if it may be written there; and its number."""
    if reserved := {BASE, MERGED} & adapters.keys():
        raise AdapterError(f"{reserved.pop()!r} is taken as a name; give that adapter another")
    everyone = dict(adapters)
    if merged is not None:
        read = [load_adapter(path) for path in adapters.values()]
        mean = combine(read, "mean", [1 / len(read)] * len(read))
        save_adapter(merged, mean.factors, read[0], {}, sorted(mean.factors))
        everyone[MERGED] = merged
    return Panel(base, everyone), len(everyone)


def _table(found: route.Comparison, choices: tuple[str, ...], domains: tuple[str, ...]) -> Table:
    ways = dict(zip(choices, found.fixed, strict=True)) | {
        "oracle": found.oracle,
        "likelihood": found.likelihood,
        "learned": found.learned,
    }
    return {
        way: dict(zip(domains, losses, strict=True)) | {"mean": sum(losses) / len(losses)}
        for way, losses in ways.items()
    }
