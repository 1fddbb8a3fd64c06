"""Another peer's metrics page, made fit to be passed on: a stranger wrote it.

Only what this version of p2ptrain itself exports is passed on: its families, their samples, their labels and
the values that these can take, each series once. So a hostile peer can lie about its numbers and do nothing
else to who stores them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Metric, ProcessCollector
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from p2ptrain.errors import BadMessage
from p2ptrain.events import clean
from p2ptrain.telemetry.metrics import MOST_OUTLIERS, Metrics

MAX_INFO = 64
"""Characters of a value of an info family."""
_NAME = re.compile(r"[0-9A-Za-z]{1,8}")
Series = tuple[str, tuple[tuple[str, str], ...]]


@dataclass(frozen=True)
class _Family:
    kind: str
    text: str
    series: frozenset[Series]
    """All that it can have, if it is no info family and names no peer."""
    labels: frozenset[str]


class Filter:
    """Knows what a peer's page may hold."""

    def __init__(self) -> None:
        self._families: Mapping[str, _Family] = {
            family.name: _Family(
                family.type,
                family.documentation,
                frozenset(_series(sample.name, sample.labels) for sample in family.samples),
                frozenset(label for sample in family.samples for label in sample.labels),
            )
            for registry in (Metrics("run", "0" * 64).registry, _process())
            for family in registry.collect()
            if family.name.startswith(("p2ptrain_", "process_"))
        }

    def passed(self, page: bytes) -> bytes:
        """The page as Prometheus text, with nothing in it that is not ours. Raises BadMessage if it is no
        such text."""
        try:
            found = list(text_string_to_metric_families(page.decode()))
        except Exception as error:  # the parser has no exception type of its own
            raise BadMessage(f"a metrics page that cannot be read: {clean(str(error), 100)}") from None
        registry = CollectorRegistry()
        kept: dict[str, Metric] = {}
        for family in found:
            if (passed := self._passed(family)) is not None:
                kept.setdefault(passed.name, passed)
        registry.register(_Kept(list(kept.values())))
        return generate_latest(registry)

    def _passed(self, family: Metric) -> Metric | None:
        # In this format an info family is a gauge whose name ends in `_info`.
        name = family.name.removesuffix("_info") if family.name not in self._families else family.name
        known = self._families.get(name)
        if known is None:
            return None
        passed = Metric(name, known.text, known.kind)
        taken: set[Series] = set()
        for sample in family.samples:
            labels = dict(sample.labels)
            if known.kind == "info":
                if set(labels) - known.labels - {"reduces"}:
                    continue
                labels = {label: clean(value, MAX_INFO) for label, value in labels.items()}
            elif name == "p2ptrain_outlier_rounds":
                if (
                    set(labels) != {"peer"}
                    or not _NAME.fullmatch(labels["peer"])
                    or len(taken) >= MOST_OUTLIERS
                ):
                    continue
            elif _series(sample.name, labels) not in known.series:
                continue
            series = _series(sample.name, labels)
            one = known.kind == "info" and taken
            if series in taken or one or isinstance(sample.value, bool) or math.isinf(sample.value):
                continue
            taken.add(series)
            passed.add_sample(sample.name, labels, sample.value)
        return passed if passed.samples else None


class _Kept(Collector):
    """Families as a collector."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


def _series(name: str, labels: Mapping[str, str]) -> Series:
    return name, tuple(sorted(labels.items()))


def _process() -> CollectorRegistry:
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry
