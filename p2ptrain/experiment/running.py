"""Conduct what is due: here, or on several cores, one process each, with one thread for torch."""

from __future__ import annotations

import math
import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection, wait

import torch

from p2ptrain.errors import DeviceError, P2PTrainError
from p2ptrain.experiment.grid import Grid
from p2ptrain.experiment.store import Store
from p2ptrain.experiment.trials import Result, Trial, conduct, cost, due, whole_cost

Progress = Callable[[float, float, Result | None], None]
"""Told (done, of) on one scale, and what has just ended."""


def run(grid: Grid, store: Store, jobs: int, progress: Progress) -> None:
    """Conduct all that is due and add each result to the store as it ends; with one job, in this process.

    However this ends, Ctrl-C included, no process is left, and what had ended is in the store. Raises
    ConfigError or CorpusError if the task lacks something, StorageError if the disk does, and DeviceError if
    a process was killed.
    """
    progress(*_done(grid, store), None)
    if jobs == 1:
        torch.set_num_threads(1)
        while trials := due(grid, store.results):
            result = conduct(grid, trials[0])
            store.add(result)
            progress(*_done(grid, store), result)
        return
    workers: list[_Worker] = []
    try:
        while True:
            under_way = [worker.trial for worker in workers if worker.trial is not None]
            waiting = [trial for trial in due(grid, store.results) if trial not in under_way]
            if not waiting and not under_way:
                return
            # One at a time for each: what comes next may follow from what is under way.
            idle = [worker for worker in workers if worker.trial is None]
            while len(idle) < len(waiting) and len(workers) < jobs:
                idle.append(_Worker(grid))
                workers.append(idle[-1])
            for worker, trial in zip(idle, waiting, strict=False):
                worker.begin(trial)
            ended = wait([worker.pipe for worker in workers if worker.trial is not None])
            for worker in workers:
                if worker.pipe in ended:
                    result = worker.end()
                    store.add(result)
                    progress(*_done(grid, store), result)
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join()


class _Worker:
    """A process that conducts one trial after the other."""

    def __init__(self, grid: Grid) -> None:
        context = multiprocessing.get_context("spawn")
        self.trial: Trial | None = None
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, grid), daemon=True)
        self.process.start()
        theirs.close()

    def begin(self, trial: Trial) -> None:
        self.trial = trial
        self.pipe.send(trial)

    def end(self) -> Result:
        """What came of it, once it has ended."""
        try:
            told: Result | P2PTrainError = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise DeviceError(
                f"a process that trained ended with status {self.process.exitcode}, perhaps for want of "
                "memory; go on with --resume and fewer --jobs"
            ) from None
        if isinstance(told, P2PTrainError):
            raise told
        self.trial = None
        return told


def _work(pipe: Connection, grid: Grid) -> None:
    """In a process of its own, until its parent ends it or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what becomes of us
    torch.set_num_threads(1)
    while True:
        try:
            trial: Trial = pipe.recv()
            try:
                told: Result | P2PTrainError = conduct(grid, trial)
            except P2PTrainError as fault:
                told = fault
            pipe.send(told)
        except (EOFError, BrokenPipeError):
            return


def _done(grid: Grid, store: Store) -> tuple[float, float]:
    """What is done, and all that will be as far as that is known, on the scale of `cost`. A store may hold
    results of a grid that was changed, which are of no account."""
    asked = set(grid.cells())
    results = [result for result in store.results.values() if result.cell in asked]
    beyond = [result for result in results if result.rate not in grid.rates_of(result.cell)]
    extra = (cost(grid, result.trial) for result in beyond if result.seed == grid.tuning_seed)
    return math.fsum(cost(grid, result.trial) for result in results), whole_cost(grid) + math.fsum(extra)
