"""What is done with a trained model: measure it (`p2ptrain eval`), and take it elsewhere (`p2ptrain export`).

An export is a folder of its own, with a model card that says what the checkpoint knows of where the model
comes from. A `causal_lm` becomes a folder that the Hugging Face libraries load, with its tokenizer; adapters
become one that PEFT loads, to be used with their base. Of any other task the parameters are safetensors under
the model's own names, and the run file says what they fit.

Not covered: who contributed before the last round, which a checkpoint does not hold.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import p2ptrain
from p2ptrain.config import PeerConfig, commented_toml, run_digest
from p2ptrain.errors import StorageError
from p2ptrain.replica.adapter_files import ADAPTER, ADAPTER_CONFIG, NOTE
from p2ptrain.replica.checkpoint import MODEL, LoadedCheckpoint, load, restore
from p2ptrain.replica.replica import Replica
from p2ptrain.tasks import Task
from p2ptrain.tasks.causal_lm import CausalLmTask
from peers.models import blank, found

CARD, CONFIG, RUN = "README.md", "config.json", "run.toml"


@dataclass(frozen=True)
class Measured:
    """What `eval` found."""

    checkpoint: str
    run_id: str
    step: int
    data: str
    """The task's note: which data this was measured on."""
    figures: dict[str, float]


def evaluate(path: Path, peer: PeerConfig) -> Measured:
    """The held-out figures of the checkpoint at `path`, on the data that this peer file names.

    Raises CheckpointError, ConfigError and CorpusError.
    """
    torch.set_num_threads(peer.threads)
    checkpoint = load(found(path))
    task, replica = blank(checkpoint, peer, with_data=True)
    restore(replica, checkpoint)
    run, position = checkpoint.run, checkpoint.snapshot.position
    figures = task.evaluate(replica.model)
    return Measured(str(checkpoint.path), run.run_id, position.step, task.note, figures)


def export(path: Path, to: Path, peer: PeerConfig) -> list[str]:
    """Write the model of the checkpoint at `path` to the folder `to`; returns the names of its files.

    Raises CheckpointError, ConfigError, and StorageError if `to` is not a new or empty folder, or cannot be
    written; nothing half-written is left.
    """
    checkpoint = load(found(path))
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise StorageError(f"{to} is there already, and not empty; name a new folder")
    task, replica = blank(checkpoint, peer)
    restore(replica, checkpoint)
    partial = to.parent / f".partial-{to.name}"
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
        partial.mkdir(parents=True)
        _write(partial, checkpoint, task, replica)
        if to.exists():
            to.rmdir()
        partial.rename(to)
    except OSError as error:
        raise StorageError(f"cannot write {to}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return sorted(each.name for each in to.iterdir())


def _write(folder: Path, checkpoint: LoadedCheckpoint, task: Task, replica: Replica) -> None:
    run = checkpoint.run
    if run.payload == "lora":
        for name in (ADAPTER, ADAPTER_CONFIG, NOTE):
            shutil.copyfile(checkpoint.path / name, folder / name)
    elif isinstance(task, CausalLmTask):
        task.save(replica.model, folder)
    else:
        shutil.copyfile(checkpoint.path / MODEL, folder / MODEL)
        about = {"p2ptrain": p2ptrain.__version__, "task": run.task.model_dump(mode="json")}
        (folder / CONFIG).write_text(json.dumps(about, indent=2) + "\n")
    (folder / RUN).write_text(commented_toml(run), encoding="utf-8")
    card = model_card(checkpoint, replica.numel, replica.fingerprint, task)
    (folder / CARD).write_text(card, encoding="utf-8")


def model_card(checkpoint: LoadedCheckpoint, parameters: int, fingerprint: str, task: Task) -> str:
    """Markdown, as the Hugging Face hub shows it: run, lineage, samples, figures and who contributed."""
    run, position, last = checkpoint.run, checkpoint.snapshot.position, checkpoint.snapshot.last
    facts = {
        "run": f"`{run.run_id}`, run file digest `{run_digest(run)}`",
        "fingerprint": f"`{fingerprint}`",
        "trained": run.task.summary,
        "parameters": f"{parameters:,}",
        "step": f"{position.step:,} of {run.total_steps:,}",
        "samples": f"{position.weight:,}, in batches of {run.target_batch_size:,}",
        "lineage": f"`{position.lineage}`",
        "state": f"`{checkpoint.snapshot.state_digest}`",
        "optimizer": f"{run.optimizer.kind}, lr {run.optimizer.lr:g} ({run.schedule.kind})",
        "versions": ", ".join(f"{name} {version}" for name, version in sorted(checkpoint.versions.items())),
    }
    if run.payload == "lora":
        size = f"rank {run.lora.rank}, alpha {run.lora.alpha}"
        facts["adapters"] = f"{size}, for the model with digest `{checkpoint.base_digest}`"
    heldout: Mapping[str, Any] = checkpoint.extra.get("heldout") or {}
    facts |= {
        f"held-out {name}, when last measured": f"{value:.4g}"
        for name, value in heldout.items()
        if value is not None
    }
    head = {"library_name": "p2ptrain", "tags": ["p2ptrain"]}
    if isinstance(task, CausalLmTask):
        library = "transformers" if run.payload == "full" else "peft"
        head = {"library_name": library, "pipeline_tag": "text-generation", "tags": ["p2ptrain"]}
        if "/" in task.base:
            head["base_model"] = task.base
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in head.items()),  # YAML spells these as JSON does
        "---",
        "",
        f"# {run.run_id}",
        "",
        "Trained together by peers over the internet, with nothing in the middle, by p2ptrain. The same run",
        "file, lineage and state digest mean the same parameters, bit for bit.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {fact} |" for name, fact in facts.items()),
        "",
        "## Who contributed",
        "",
    ]
    if last is None:
        lines.append("Nobody yet: these are the first parameters.")
    else:
        lines += [
            f"To the last step, {last.step}; a checkpoint does not hold who was there before:",
            "",
            "| peer | samples |",
            "|---|---|",
            *(f"| `{peer}` | {samples:,} |" for peer, samples in zip(last.roster, last.samples, strict=True)),
        ]
    return "\n".join(lines) + "\n"
