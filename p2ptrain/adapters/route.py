"""Which adapter is best in a given context: learned from what each of them makes of the text.

One adapter can hardly improve another that learned something else, but it can be chosen where it is the
better one. A choice is made from the beginning of a text, its *prefix*, and judged by the loss on what
follows. Choice 0 is the base without any adapter. Four ways are measured beside each other:

- each fixed choice; - the *oracle*: by the loss on what follows itself, which no router can know; none does
better; - by *likelihood*: the one that makes the most of the prefix. It needs a pass of every adapter; -
*learned*: p(choice | x) = softmax(W·f(x) + b), where f are means of the base's hidden states over the prefix.
It is trained by cross-entropy to the best choice, softened so that one which is hardly worse is hardly less
right. Below a confidence it is the base's. (Trained on the loss that it would cause, Σ over choices of
p(choice | x) · loss(choice, x), it learned less from as many texts: that is not convex.)

How strongly weights are held back, and that confidence, are what does best on texts that a router did not
learn from: each fifth of them is judged by one that learned from the others.

Not covered: choosing again in the middle of a text, which would want the attention's cache computed anew, and
choosing by layer or token (Arrow, X-LoRA), which did worse on texts as short as ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 100
SOFTNESS = 0.1
"""Nats per token: a choice whose loss is so much higher is e times less right."""
FOLDS = 5
WEIGHT_DECAYS = (1e-3, 1e-2, 1e-1, 1.0)
THRESHOLDS = tuple(number / 20 for number in range(20))
INDIFFERENT = 1e-3
"""Of the loss: of thresholds that differ by no more the highest is taken, since a context that is unlike all
that were learned from is better left to the base."""


@dataclass(frozen=True)
class Scores:
    """What all choices make of some texts, in nats per token."""

    prefix: Tensor
    """float64 [choices, texts]: mean loss over the prefix."""
    rest: Tensor
    """float64 [choices, texts]: mean loss over what follows it."""
    features: Tensor
    """float64 [texts, width]: what the base thinks of the prefix."""
    domains: tuple[int, ...]
    """Of each text, where it comes from."""

    def of(self, texts: Tensor) -> Scores:
        """Of these texts alone: bool [texts]."""
        domains = tuple(domain for domain, kept in zip(self.domains, texts.tolist(), strict=True) if kept)
        return Scores(self.prefix[:, texts], self.rest[:, texts], self.features[texts], domains)


@dataclass(frozen=True)
class Router:
    """A linear router. float64: `weight` [choices, width], `bias` [choices], `center` and `scale` [width]."""

    weight: Tensor
    bias: Tensor
    center: Tensor
    scale: Tensor
    threshold: float
    """Below this confidence the base is chosen."""

    def probabilities(self, features: Tensor) -> Tensor:
        """float64 [texts, choices]."""
        return torch.softmax((features - self.center) / self.scale @ self.weight.T + self.bias, dim=1)

    def choose(self, features: Tensor) -> Tensor:
        """int64 [texts]: the likeliest choice, or 0 where none is likely enough."""
        confidence, choice = self.probabilities(features).max(dim=1)
        return torch.where(confidence >= self.threshold, choice, 0)


def train(scores: Scores, threshold: float | None = None) -> Router:
    """The router that tells best what is right for these texts; the same for the same scores. Without a
    `threshold` it is found."""
    texts = torch.arange(scores.rest.shape[1])
    judged: dict[float, tuple[Tensor, Tensor]] = {}
    for decay in WEIGHT_DECAYS:
        confidence = torch.zeros(len(texts), dtype=torch.float64)
        choice = torch.zeros_like(texts)
        for fold in range(FOLDS):
            held = texts % FOLDS == fold
            router = _fitted(scores.of(~held), decay, 0.0)
            confidence[held], choice[held] = router.probabilities(scores.features[held]).max(dim=1)
        judged[decay] = confidence, choice

    def loss(decay: float, least: float) -> float:
        confidence, choice = judged[decay]
        return scores.rest[torch.where(confidence >= least, choice, 0), texts].mean().item()

    decay = min(WEIGHT_DECAYS, key=lambda each: loss(each, threshold or 0.0))
    if threshold is None:
        best = min(loss(decay, least) for least in THRESHOLDS)
        threshold = max(least for least in THRESHOLDS if loss(decay, least) <= best * (1 + INDIFFERENT))
    return _fitted(scores, decay, threshold)


def _fitted(scores: Scores, decay: float, threshold: float) -> Router:
    center, scale = scores.features.mean(0), scores.features.std(0).clamp_min(1e-6)
    inputs, right = (scores.features - center) / scale, torch.softmax(-scores.rest.T / SOFTNESS, dim=1)
    weight = torch.zeros(right.shape[1], inputs.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(right.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        told = torch.log_softmax(inputs @ weight.T + bias, dim=1)
        value = decay * weight.square().mean() - (right * told).sum(1).mean()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return Router(weight.detach(), bias.detach(), center, scale, threshold)


@dataclass(frozen=True)
class Comparison:
    """Mean loss after the prefix, in nats per token, by domain: one number each in the order of `domains`."""

    fixed: tuple[tuple[float, ...], ...]
    """Of each choice, always."""
    oracle: tuple[float, ...]
    likelihood: tuple[float, ...]
    learned: tuple[float, ...]
    confusion: tuple[tuple[int, ...], ...]
    """[the oracle's choice][the learned one]: how many texts."""


def compare(scores: Scores, router: Router, domains: int) -> Comparison:
    """All ways of choosing, on texts that the router has not seen."""
    best, learned = scores.rest.argmin(0), router.choose(scores.features)
    choices = scores.rest.shape[0]
    confusion = torch.zeros(choices, choices, dtype=torch.int64)
    confusion.index_put_((best, learned), torch.ones_like(best), accumulate=True)
    where = torch.tensor(scores.domains)

    def by_domain(chosen: Tensor) -> tuple[float, ...]:
        loss = scores.rest[chosen, torch.arange(len(chosen))]
        return tuple(loss[where == domain].mean().item() for domain in range(domains))

    return Comparison(
        fixed=tuple(by_domain(torch.full_like(best, choice)) for choice in range(choices)),
        oracle=by_domain(best),
        likelihood=by_domain(scores.prefix.argmin(0)),
        learned=by_domain(learned),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
    )


def joined(parts: Sequence[Scores]) -> Scores:
    """The texts of all parts as one."""
    return Scores(
        torch.cat([part.prefix for part in parts], dim=1),
        torch.cat([part.rest for part in parts], dim=1),
        torch.cat([part.features for part in parts]),
        tuple(domain for part in parts for domain in part.domains),
    )
