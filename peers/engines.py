"""The engine that a peer file asks for: the device is found and tried, the micro-batch measured."""

from __future__ import annotations

import time
from functools import partial

from p2ptrain import events
from p2ptrain.config import PeerConfig, RunConfig
from p2ptrain.errors import DeviceError
from p2ptrain.gradients.devices import choose_place, find_devices
from p2ptrain.gradients.engine import Engine
from p2ptrain.gradients.micro_batch import best_size, measure_sizes
from p2ptrain.replica.replica import Replica
from p2ptrain.tasks import Task


def build_engine(
    run: RunConfig, config: PeerConfig, task: Task, replica: Replica
) -> tuple[Engine, events.DeviceChosen]:
    """Move the replica's model to the device that it will compute on, and see how much that takes at once.

    Raises DeviceError if the device is not there, or has too little memory for a sample.
    """
    found = find_devices()
    place = choose_place(config.device, config.precision, found)
    if place.device.type != "cpu":
        try:
            replica.move_model(place.device)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise DeviceError(
                f"the model does not fit into the memory of {place.found} ({reason}); close what else uses "
                'it, or set device = "cpu" in the peer file'
            ) from error
    size, pace = config.micro_batch_size, None
    engine = Engine(replica.model, replica.gradient, place, 1, compiled=config.compile)
    if size == "auto":
        # Half of the target: as one micro-batch, it would leave nothing to do for others in time.
        most = max(run.target_batch_size // 2, 1)
        draw = partial(task.batch, replica.position.step, "trial")
        trials = measure_sizes(partial(engine.try_size, draw, task.loss_sum), most, time.perf_counter)
        if trials[0].seconds is None:
            engine.refuse()
        size = best_size(trials)
        pace = next(trial.samples_per_second for trial in trials if trial.size == size)
    engine.most_samples = size
    flaws = [each for each in found if each.flaw] if config.device == "auto" else []
    return engine, events.DeviceChosen(
        device=str(place.found),
        precision=place.precision,
        samples=size,
        samples_per_second=pace,
        flaw=f"{flaws[0]} does not compute: {flaws[0].flaw}" if flaws else "",
    )
