"""What becomes of adapters that people put together or choose among: rows R1 to R4 of the literature.

    python -m tests.benchmarks.adapters [--rows R1 R2 R3 R4] [--seeds 3] [--json]

Everything is trained here, offline, one thread: on three kinds of text that every CPython brings along, its
own modules (`py`), the help of `pydoc` (`english`) and its C headers (`c`; Debian's python3-dev). A tenth of
each is held out, and no adapter or router learns from it.

- R1, *choosing*: a base that has seen a little of all three, and an adapter for each. The best possible
  choice beats the base, and what a router learns is within 1 % of it. By `p2ptrain.adapters.routing`, as the
  command has it. Beside it each text with the adapter of its own kind (`own`), one adapter that learned all
  three with as many samples (`joint`), and the mean of the three (`merged`).
- R2, *the mean of adapters that learned the same*: a base without English, and four peers with a quarter of
  the English text each. The exact mean of their adapters beats the best of them, with each seed.
- R3, *the wrong mean*: the same four, averaged factor by factor, from one first A and from a first A each.
  With unlike ones it is worse than the exact mean by more than two standard deviations over the seeds.
- R4, *rounds of it*: four peers, five rounds of 200 steps. `ffa` trains B only; `fedit` averages factor by
  factor; `fedex` adds what that lacks to the base; `flora` merges the exact mean and begins with new factors;
  `turns` is `strategy = "local"` here, B and A in turn; `central` is one process with all samples, as with
  `strategy = "sync"`. Asked: `ffa` is the worst, `central` the best.

R2 to R4 train a perceptron of two hidden layers, 45,000 parameters, with rank 8 on each of its layers; R1 a
llama of 110,000. All at one learning rate, which is no method's own best. Losses are nats per byte, held out;
± is the standard deviation over the seeds.

Not covered: large models, for which the gaps differ.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from p2ptrain.adapters.factors import Factors, compressed, concatenated
from p2ptrain.config import Lora
from p2ptrain.tasks.corpus import load_corpus
from p2ptrain.tasks.lora import add_adapters

KINDS = ("py", "english", "c")
CONTEXT, WIDTH = 8, 96
BATCH, RATE, RANK = 128, 4e-3, 8
BASE_STEPS, OWN_STEPS = 1500, 600
PEERS, ROUNDS, ROUND_STEPS = 4, 5, 200
HELDOUT = 8192
"""Windows of a text on which losses are measured."""

Changes = Mapping[str, Factors]
"""Layer → by what an adapter changes its weight."""


# -- text ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """uint8 [bytes] each."""

    train: Tensor
    heldout: Tensor

    def part(self, number: int, parts: int) -> Text:
        """One of so many pieces of the text to learn from."""
        size = len(self.train) // parts
        return Text(self.train[number * size : (number + 1) * size], self.heldout)

    def draw(self, count: int, chance: torch.Generator) -> Tensor:
        """int64 [count, CONTEXT + 1]."""
        return _windows(self.train, torch.randint(len(self.train) - CONTEXT, (count,), generator=chance))

    def to_judge(self) -> Tensor:
        return _windows(self.heldout, torch.linspace(0, len(self.heldout) - CONTEXT - 1, HELDOUT).long())


def _windows(data: Tensor, starts: Tensor) -> Tensor:
    return data[starts[:, None] + torch.arange(CONTEXT + 1)].long()


@cache
def text_of(kind: str) -> Text:
    match kind:
        case "py":
            corpus = load_corpus("stdlib", holdout=0.1, context=CONTEXT)
            return Text(corpus.train, corpus.heldout)
        case "english":
            from pydoc_data.topics import topics

            data = "\n".join(topics[name] for name in sorted(topics)).encode()
        case _:
            headers = sorted(Path(sysconfig.get_path("include")).rglob("*.h"))
            if not headers:
                sys.exit("adapters.py: this Python has no C headers; install them (Debian: python3-dev)")
            data = b"\n".join(header.read_bytes() for header in headers)
    whole = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    cut = len(whole) * 9 // 10
    return Text(whole[:cut], whole[cut:])


# -- the small model -----------------------------------------------------------------------------------------


class Perceptron(nn.Module):
    """Predicts a byte from the `CONTEXT` before it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(256, 12)
        self.first = nn.Linear(12 * CONTEXT, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, 256)

    def forward(self, before: Tensor) -> Tensor:
        """int64 [samples, CONTEXT] → float32 [samples, 256]."""
        hidden = torch.tanh(self.first(self.table(before).flatten(1)))
        return self.out(torch.tanh(self.second(hidden)))


def loss(model: nn.Module, rows: Tensor) -> Tensor:
    return F.cross_entropy(model(rows[:, :CONTEXT]), rows[:, CONTEXT])


@torch.no_grad()
def heldout(model: nn.Module, text: Text) -> float:
    return loss(model, text.to_judge()).item()


def adam(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, betas=(0.9, 0.99))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    draw: Callable[[torch.Generator], Tensor],
    steps: int,
    chance: torch.Generator,
) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, draw(chance)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def base_without_english(seed: int) -> Perceptron:
    torch.manual_seed(seed)
    model, chance = Perceptron(), torch.Generator().manual_seed(seed)
    texts = [text_of(kind) for kind in ("py", "c")]

    def draw(chance: torch.Generator) -> Tensor:
        return torch.cat([text.draw(BATCH // 2, chance) for text in texts])

    train(model, adam(list(model.parameters())), draw, BASE_STEPS, chance)
    return model


# -- adapters of it ------------------------------------------------------------------------------------------


class Adapted:
    """The base with adapters in it; `a` and `b` are their factors, layer by layer."""

    def __init__(self, base: Perceptron, seed: int) -> None:
        self.model = copy.deepcopy(base)
        add_adapters(self.model, Lora(rank=RANK, alpha=2 * RANK), seed)
        self.layers = {
            name: module for name, module in self.model.named_modules() if hasattr(module, "lora_A")
        }
        self.a = {name: self._factor(name, "lora_A") for name in self.layers}
        self.b = {name: self._factor(name, "lora_B") for name in self.layers}

    def _factor(self, layer: str, side: str) -> nn.Parameter:
        weight: nn.Parameter = getattr(self.layers[layer], side)["default"].weight
        return weight

    def changes(self) -> Changes:
        scale = {name: layer.scaling["default"] for name, layer in self.layers.items()}
        return {
            name: Factors(self.a[name].detach().double(), scale[name] * self.b[name].detach().double())
            for name in self.layers
        }

    @torch.no_grad()
    def take(self, others: Sequence[Adapted], sides: str = "ab") -> None:
        """The means of the others' factors."""
        for side in sides:
            for name, mine in getattr(self, side).items():
                mine.copy_(torch.stack([getattr(other, side)[name] for other in others]).mean(0))

    @torch.no_grad()
    def change_base(self, changes: Changes) -> None:
        for name, change in changes.items():
            self.layers[name].base_layer.weight.add_(change.delta().float())


def changed(base: Perceptron, changes: Changes) -> Perceptron:
    model = copy.deepcopy(base)
    with torch.no_grad():
        for name, change in changes.items():
            model.get_submodule(name).weight.add_(change.delta().float())  # type: ignore[operator]
    return model


def exact_mean(all_changes: Sequence[Changes]) -> Changes:
    shares = [1 / len(all_changes)] * len(all_changes)
    return {name: concatenated([each[name] for each in all_changes], shares) for name in all_changes[0]}


def mean_of_factors(all_changes: Sequence[Changes]) -> Changes:
    return {
        name: Factors(
            torch.stack([each[name].a for each in all_changes]).mean(0),
            torch.stack([each[name].b for each in all_changes]).mean(0),
        )
        for name in all_changes[0]
    }


def cut(changes: Changes) -> Changes:
    return {name: compressed(each, RANK, None).factors for name, each in changes.items()}


def peers_apart(base: Perceptron, seed: int, *, like: bool) -> list[Changes]:
    """What four peers learn of a quarter of the English text each; `like`: from the same first A."""
    found = []
    for peer in range(PEERS):
        adapted = Adapted(base, seed if like else 100 * seed + peer)
        text = text_of("english").part(peer, PEERS)
        chance = torch.Generator().manual_seed(1000 * seed + peer)
        parameters = [*adapted.a.values(), *adapted.b.values()]
        train(adapted.model, adam(parameters), lambda c, text=text: text.draw(BATCH, c), OWN_STEPS, chance)
        found.append(adapted.changes())
    return found


# -- R2 and R3 -----------------------------------------------------------------------------------------------


def soup(seed: int) -> dict[str, float]:
    """R2 and R3, of one seed."""
    base, english = base_without_english(seed), text_of("english")
    found = {"base": heldout(base, english)}
    for start in ("like", "unlike"):
        peers = peers_apart(base, seed, like=start == "like")
        parents = [heldout(changed(base, each), english) for each in peers]
        exact = exact_mean(peers)
        found |= {
            f"best parent, {start}": min(parents),
            f"worst parent, {start}": max(parents),
            f"exact mean, {start}": heldout(changed(base, exact), english),
            f"exact mean cut to rank {RANK}, {start}": heldout(changed(base, cut(exact)), english),
            f"mean of factors, {start}": heldout(changed(base, mean_of_factors(peers)), english),
        }
    return found


def soup_passes(rows: Sequence[dict[str, float]]) -> bool:
    """R2."""
    return all(row["exact mean, like"] < row["best parent, like"] for row in rows)


def wrong_mean_shows(rows: Sequence[dict[str, float]]) -> bool:
    """R3."""
    gaps = [row["mean of factors, unlike"] - row["exact mean, unlike"] for row in rows]
    return statistics.mean(gaps) > 2 * spread(gaps)


# -- R4 ------------------------------------------------------------------------------------------------------


def rounds(seed: int) -> dict[str, float]:
    """R4, of one seed."""
    base = base_without_english(seed)
    english = text_of("english")
    found = {"base": heldout(base, english)}
    for method in ("ffa", "fedit", "fedex", "flora", "turns"):
        found[method] = heldout(in_rounds(base, seed, method).model, english)
    found["central"] = heldout(central(base, seed).model, english)
    return found


def in_rounds(base: Perceptron, seed: int, method: str) -> Adapted:
    """A peer's model after the last round; all have the same."""
    peers = [Adapted(base, seed) for _ in range(PEERS)]
    texts = [text_of("english").part(number, PEERS) for number in range(PEERS)]
    chances = [torch.Generator().manual_seed(1000 * seed + number) for number in range(PEERS)]
    optimizers = [{side: adam(list(getattr(peer, side).values())) for side in "ab"} for peer in peers]
    for number in range(ROUNDS):
        sides = {"ffa": "b", "turns": "ba"[number % 2]}.get(method, "ab")
        for peer, text, chance, own in zip(peers, texts, chances, optimizers, strict=True):
            for _ in range(ROUND_STEPS):
                peer.model.zero_grad()
                loss(peer.model, text.draw(BATCH, chance)).backward()  # type: ignore[no-untyped-call]
                for side in sides:
                    own[side].step()
        changes = [peer.changes() for peer in peers]
        if method == "flora":
            exact = exact_mean(changes)
            merged = copy.deepcopy(peers[0])
            merged.change_base(exact)
            peers = [begun_again(merged, seed + 10 * (number + 1)) for _ in range(PEERS)]
            optimizers = [{side: adam(list(getattr(peer, side).values())) for side in "ab"} for peer in peers]
            continue
        residual = {
            name: concatenated([exact, mean], [1.0, -1.0])
            for (name, exact), mean in zip(
                exact_mean(changes).items(), mean_of_factors(changes).values(), strict=True
            )
        }
        before = [copy.deepcopy(peer) for peer in peers]
        for peer in peers:
            peer.take(before, sides)
            if method == "fedex":
                peer.change_base(residual)
    return peers[0]


def begun_again(merged: Adapted, seed: int) -> Adapted:
    """The same base, with factors that are new: A drawn, B zero."""
    base = Perceptron()
    plain = {
        name.replace(".base_layer", ""): value
        for name, value in merged.model.state_dict().items()
        if "lora_" not in name
    }
    base.load_state_dict(plain)
    return Adapted(base, seed)


def central(base: Perceptron, seed: int) -> Adapted:
    """As many steps, each of all peers' samples."""
    adapted = Adapted(base, seed)
    texts = [text_of("english").part(number, PEERS) for number in range(PEERS)]

    def draw(chance: torch.Generator) -> Tensor:
        return torch.cat([text.draw(BATCH, chance) for text in texts])

    optimizer = adam([*adapted.a.values(), *adapted.b.values()])
    train(adapted.model, optimizer, draw, ROUNDS * ROUND_STEPS, torch.Generator().manual_seed(1000 * seed))
    return adapted


def rounds_pass(rows: Sequence[dict[str, float]]) -> bool:
    """R4."""
    means = {name: statistics.mean(row[name] for row in rows) for name in rows[0] if name != "base"}
    return max(means, key=means.__getitem__) == "ffa" and min(means, key=means.__getitem__) == "central"


# -- R1 ------------------------------------------------------------------------------------------------------

LENGTH, PREFIX = 128, 64
LEARNED_WINDOWS, JUDGED_WINDOWS = 800, 300
"""Of each kind of text, at most."""
LLAMA_BATCH, LLAMA_BASE_STEPS, LLAMA_OWN_STEPS, LLAMA_RATE = 8, 500, 300, 3e-3


def choosing(seed: int) -> dict[str, float]:
    """R1, of one seed: mean over the kinds of text of the loss after the prefix."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from p2ptrain.adapters.panel import Panel
    from p2ptrain.adapters.routers import save_router
    from p2ptrain.adapters.routing import judged, trained
    from p2ptrain.adapters.texts import ByteTokenizer, windows

    chance = torch.Generator().manual_seed(seed)
    for_models: dict[str, Tensor] = {}
    for_router: dict[str, Tensor] = {}
    for kind in KINDS:
        cut = len(text_of(kind).train) * 4 // 5
        for_models[kind], for_router[kind] = text_of(kind).train.split([cut, len(text_of(kind).train) - cut])

    def learn(model: Any, kinds: Sequence[str], steps: int, parameters: Sequence[nn.Parameter]) -> None:
        optimizer = torch.optim.AdamW(parameters, lr=LLAMA_RATE, weight_decay=0.0)
        for step in range(steps):
            data = for_models[kinds[step % len(kinds)]]
            starts = torch.randint(len(data) - LENGTH, (LLAMA_BATCH,), generator=chance)
            tokens = data[starts[:, None] + torch.arange(LENGTH)].long()
            optimizer.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()

    with tempfile.TemporaryDirectory(prefix="choosing-") as name:
        folder = Path(name)
        torch.manual_seed(seed)
        form = LlamaConfig(
            vocab_size=257,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
        )
        base = LlamaForCausalLM(form)
        learn(base, KINDS, LLAMA_BASE_STEPS, list(base.parameters()))
        base.save_pretrained(folder / "base")
        everyone = {kind: ([kind], LLAMA_OWN_STEPS) for kind in KINDS}
        for own, (kinds, steps) in (everyone | {"joint": ([*KINDS], 3 * LLAMA_OWN_STEPS)}).items():
            torch.manual_seed(seed)
            adapted = get_peft_model(
                AutoModelForCausalLM.from_pretrained(folder / "base"),
                LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"),
            )
            learn(adapted, kinds, steps, [each for each in adapted.parameters() if each.requires_grad])
            adapted.save_pretrained(folder / own)
        texts: dict[str, dict[str, Path]] = {"learn": {}, "judge": {}}
        for kind in KINDS:
            for use, piece in (("learn", for_router[kind]), ("judge", text_of(kind).heldout)):
                texts[use][kind] = folder / f"{use}-{kind}.txt"
                texts[use][kind].write_bytes(bytes(piece.numpy()))
        adapters = {kind: folder / kind for kind in KINDS}

        def progress(line: str) -> None:
            print(f"R1, seed {seed}: {line}", file=sys.stderr, flush=True)

        router, note = trained(
            folder / "base",
            adapters,
            texts["learn"],
            prefix=PREFIX,
            length=LENGTH,
            most=LEARNED_WINDOWS,
            threshold=None,
            progress=progress,
        )
        save_router(folder / "router", router, note)
        table, confusion = judged(
            router, note, texts["judge"], length=LENGTH, most=JUDGED_WINDOWS, progress=progress
        )
        progress(f"threshold {router.threshold:g}; best choice by row, router's by column: {confusion}")
        found = {way: losses["mean"] for way, losses in table.items()}
        found["own"] = statistics.mean(table[kind][kind] for kind in KINDS)
        panel, joint = Panel(folder / "base", {"joint": folder / "joint"}), []
        for file in texts["judge"].values():
            tokens = windows(file, ByteTokenizer(), LENGTH, JUDGED_WINDOWS)
            joint.append(panel.losses(tokens, [1] * len(tokens))[:, PREFIX - 1 :].mean().item())
        return found | {"joint": statistics.mean(joint)}


def choosing_passes(rows: Sequence[dict[str, float]]) -> bool:
    return all(row["oracle"] < row["base"] and row["learned"] <= 1.01 * row["oracle"] for row in rows)


# -- all of it -----------------------------------------------------------------------------------------------

Measure = Callable[[int], dict[str, float]]
Rule = Callable[[Sequence[dict[str, float]]], bool]
ROWS: dict[str, tuple[str, Measure, Rule]] = {
    "R1": ("the best choice < base, and the learned one within 1 % of it", choosing, choosing_passes),
    "R2": ("exact mean < best parent, with each seed", soup, soup_passes),
    "R3": ("mean of factors - exact mean > 2 σ, from unlike first A", soup, wrong_mean_shows),
    "R4": ("ffa worst, central best", rounds, rounds_pass),
}


def spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def measured(names: Sequence[str], seeds: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    done: dict[tuple[Measure, int], dict[str, float]] = {}
    for name in names:
        asked, measure, passes = ROWS[name]
        rows, began = [], time.monotonic()
        for seed in range(seeds):
            if (measure, seed) not in done:
                done[measure, seed] = measure(seed)
                print(f"{name}, seed {seed}: {json.dumps(done[measure, seed])}", file=sys.stderr, flush=True)
            rows.append(done[measure, seed])
        found[name] = {
            "asked": asked,
            "passes": passes(rows),
            "seconds": round(time.monotonic() - began, 1),
            "losses": {
                key: {
                    "mean": statistics.mean(row[key] for row in rows),
                    "sigma": spread([row[key] for row in rows]),
                    "seeds": [row[key] for row in rows],
                }
                for key in rows[0]
            },
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measured(options.rows, options.seeds)
    if options.json:
        print(json.dumps(found))
        return
    for name, row in found.items():
        verdict = "holds" if row["passes"] else "does not hold"
        print(f"\n{name}: {row['asked']}: {verdict} ({options.seeds} seeds, {row['seconds']:.0f} s)")
        for way, figures in row["losses"].items():
            print(f"  {way:<34}{figures['mean']:.4f} ± {figures['sigma']:.4f}")


if __name__ == "__main__":
    main()
