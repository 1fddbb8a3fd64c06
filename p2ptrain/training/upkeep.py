"""What is due after some steps, and whenever somebody asks: held-out figures, a sample of what the model
writes, a checkpoint."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import torch

from p2ptrain import events
from p2ptrain.config import PeerConfig, RunConfig
from p2ptrain.errors import LocalFault
from p2ptrain.gradients.engine import Engine
from p2ptrain.replica.checkpoint import save
from p2ptrain.replica.log import EntryLog
from p2ptrain.replica.replica import Replica
from p2ptrain.replica.snapshot import Snapshot
from p2ptrain.tasks import Task
from p2ptrain.training.hands import Hands, now

PREVIEW_SECONDS = 15.0
"""Between two samples of what the model writes: enough to watch it learn, at a few per cent of the time."""
PREVIEW_LENGTH = 100
"""In the task's units: for text, characters. Others wait for this peer meanwhile."""


class Upkeep:
    """Looks at the replica as it stands, and saves it."""

    def __init__(
        self,
        run: RunConfig,
        config: PeerConfig,
        task: Task,
        replica: Replica,
        engine: Engine,
        log: EntryLog,
        folder: Path | None,
        hands: Hands,
    ) -> None:
        """`folder`: for checkpoints; None for none."""
        self._run, self._config, self._task = run, config, task
        self._replica, self._engine, self._log, self._hands = replica, engine, log, hands
        self._folder = folder
        self.heldout: dict[str, float] = {}
        """The last figures."""
        self._previewed = float("-inf")
        self._saving = asyncio.Lock()

    async def after_step(self) -> None:
        """What is due at this step."""
        step, config = self._replica.position.step, self._config
        if config.eval_every_steps and step % config.eval_every_steps == 0:
            await self.evaluate()
        if config.checkpoint_every_steps and step % config.checkpoint_every_steps == 0:
            self.save_soon()

    async def evaluate(self) -> None:
        """Held-out figures, and now and then a sample."""
        began = now()
        figures: dict[str, float] = await self._hands.compute(self._engine.judge, self._task.evaluate)
        self.heldout = figures
        self._hands.observe(
            events.Evaluated(
                step=self._replica.position.step,
                loss=figures["loss"],
                bits_per_byte=figures.get("bits_per_byte"),
                seconds=now() - began,
                zlib_bits_per_byte=figures.get("zlib_bits_per_byte"),
                accuracy=figures.get("accuracy"),
            )
        )
        if began - self._previewed >= PREVIEW_SECONDS:
            self._previewed = began
            text = await self._hands.compute(self._preview)
            self._hands.observe(events.Previewed(step=self._replica.position.step, text=text))

    def _preview(self) -> str:
        """On the compute thread; the same text on every peer at this step."""
        chance = torch.Generator().manual_seed(self._replica.position.step)
        return self._engine.judge(self._task.preview, "\n", PREVIEW_LENGTH, chance)

    async def save(self) -> Path | None:
        """Write a checkpoint; None, with a warning, if that fails."""
        if self._folder is None:
            return None
        began = now()
        snapshot: Snapshot = await self._hands.compute(self._replica.snapshot)
        write = partial(
            save,
            self._folder,
            snapshot,
            self._run,
            {"heldout": self.heldout},
            keep=self._config.checkpoints_kept,
            lineages=self._log.lineages(snapshot.position),
            base_digest=self._replica.base_digest,
        )
        step = snapshot.position.step
        try:
            async with self._saving:
                path: Path = await self._hands.aside(write)
        except LocalFault as fault:
            self._hands.observe(events.CheckpointFailed(step=step, reason=str(fault)))
            return None
        self._hands.observe(
            events.CheckpointSaved(
                step=step, path=str(path), size_bytes=len(snapshot.blob), seconds=now() - began
            )
        )
        return path

    def save_soon(self) -> None:
        """Write one beside whatever else this peer does."""
        self._hands.spawn(self._save_beside())

    async def _save_beside(self) -> None:
        """On a disk too slow for the interval, checkpoints are left out."""
        if not self._saving.locked():
            await self.save()
