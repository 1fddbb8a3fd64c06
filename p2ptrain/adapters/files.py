"""Adapter folders in PEFT's format, read as factors and written from them; and their base, to merge them
into.

A folder has `adapter_config.json` and `adapter_model.safetensors` with
`base_model.model.<module>.lora_A.weight` [rank, in] and `…lora_B.weight` [out, rank]. PEFT itself notes no
more of the base than a name, so `p2ptrain.json` beside them has the base's digest; adapters of different
bases are not combined.

PEFT is not needed for any of this. What it can express and a product of two factors cannot is refused by
name.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from p2ptrain.adapters.factors import Factors
from p2ptrain.errors import AdapterError, StorageError
from p2ptrain.records import Digest
from p2ptrain.replica.adapter_files import ADAPTER, ADAPTER_CONFIG, NOTE

MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_CONFIG_BYTES = 4 * 2**20
_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")


class Note(BaseModel):
    """The content of `p2ptrain.json`: what PEFT's own files do not say. Other fields are kept by nobody."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    base_digest: Digest | None = None
    """Of the base's parameters; None if whoever made the adapter did not know it."""
    samples: int = Field(default=0, ge=0)
    """That it was trained on; 0 if unknown."""


class LoraSettings(BaseModel):
    """Of `adapter_config.json`, what the meaning of the factors depends on."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    peft_type: str
    r: int = Field(ge=1)
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    fan_in_fan_out: bool = False
    base_model_name_or_path: str | None = None
    revision: str | None = None

    def scaling(self, module: str, rank: int) -> float:
        """By what B·A is multiplied: alpha / rank, or alpha / √rank with rank-stabilised LoRA."""
        alpha = next(
            (value for key, value in self.alpha_pattern.items() if _names(key, module)), self.lora_alpha
        )
        return float(alpha / (rank**0.5 if self.use_rslora else rank))


def _names(key: str, module: str) -> bool:
    """Whether a key of one of PEFT's patterns is for that module: the end of its name, as a whole word."""
    try:
        return re.fullmatch(rf"(.*\.)?({key})", module) is not None
    except re.error:
        return False


UNSUPPORTED = {
    "use_dora": "DoRA scales each column by a magnitude of its own",
    "lora_bias": "it trains biases, too",
    "modules_to_save": "it replaces whole modules",
    "target_parameters": "it changes parameters that are no module's weight",
    "kasa_config": "KaSA has singular values of its own",
    "use_qalora": "QA-LoRA pools the input first",
    "use_bdlora": "its factors are block-diagonal",
    "layer_replication": "it repeats layers of the base",
    "trainable_token_indices": "it replaces rows of the embedding",
}
"""Settings of PEFT with which a change is not just the product of two factors."""


@dataclass(frozen=True)
class Adapter:
    """An adapter folder, read."""

    path: Path
    config: Mapping[str, Any]
    """`adapter_config.json` as it is."""
    settings: LoraSettings
    factors: Mapping[str, Factors]
    """By module, in order of names."""
    note: Note
    digest: str
    """SHA-256 of `adapter_model.safetensors`."""


def load_adapter(path: Path) -> Adapter:
    """Read the folder. Raises AdapterError that names the file, what is wrong with it and what to do."""
    config = read_json(path / ADAPTER_CONFIG, path)
    try:
        settings = LoraSettings.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise AdapterError(
            f"{path / ADAPTER_CONFIG}: {where}: {first['msg']}; it must be as PEFT writes it"
        ) from None
    if settings.peft_type != "LORA":
        raise AdapterError(
            f"{path} is an adapter of type {settings.peft_type[:40]!r}; only LORA can be combined"
        )
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{path} trains biases (bias = {config['bias']!r}); train it with bias = 'none'")
    for key, why in UNSUPPORTED.items():
        if config.get(key):
            raise AdapterError(
                f"{path} was trained with {key}: {why}, so it cannot be combined; train it without"
            )

    halves: dict[str, dict[str, Tensor]] = {}
    with opened(path / ADAPTER, path) as file:
        for key in file.keys():  # noqa: SIM118  (it is no mapping)
            if (found := _FACTOR.fullmatch(key)) is None:
                raise AdapterError(
                    f"{path / ADAPTER} holds {key[:80]!r}, which is no factor of a LoRA adapter"
                )
            halves.setdefault(found["module"], {})[found["side"]] = file.get_tensor(key).double()
    factors = {}
    for module, half in sorted(halves.items()):
        if half.keys() != {"A", "B"}:
            raise AdapterError(f"{path / ADAPTER} has only one factor of {module}; copy the folder again")
        a, b = half["A"], half["B"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise AdapterError(
                f"{path / ADAPTER}: the factors of {module} are {list(a.shape)} and {list(b.shape)}; "
                "expected [rank, in] and [out, rank] (convolutions cannot be combined)"
            )
        if not (a.isfinite().all() and b.isfinite().all()):
            raise AdapterError(
                f"{path / ADAPTER}: a value of {module} is not finite; its training went wrong"
            )
        factors[module] = Factors(a, settings.scaling(module, a.shape[0]) * b)
    if not factors:
        raise AdapterError(f"{path / ADAPTER} holds no factor at all; copy the folder again")
    return Adapter(path, config, settings, factors, _read_note(path), file_digest(path / ADAPTER))


def check_together(adapters: list[Adapter]) -> None:
    """Raises AdapterError if they are not of one base, or do not change weights of equal shapes."""
    first = adapters[0]
    for other in adapters[1:]:
        mine, theirs = first.note.base_digest, other.note.base_digest
        if mine and theirs and mine != theirs:
            raise AdapterError(
                f"{first.path} was trained on a base with digest {mine[:8]}, {other.path} on one with "
                f"{theirs[:8]}: their changes mean nothing together; choose adapters of one base"
            )
        ours, named = (
            (each.settings.base_model_name_or_path, each.settings.revision) for each in (first, other)
        )
        if not (mine and theirs) and ours != named:
            raise AdapterError(
                f"{first.path} names {ours[0]!r} as its base, {other.path} names {named[0]!r}, and "
                f"digests that would show them to be the same are not in both {NOTE}; choose adapters "
                "of one base"
            )
        if first.settings.fan_in_fan_out != other.settings.fan_in_fan_out:
            raise AdapterError(
                f"{first.path} and {other.path} differ in fan_in_fan_out: they are not of one base"
            )
        for module in first.factors.keys() & other.factors.keys():
            if first.factors[module].shape != other.factors[module].shape:
                raise AdapterError(
                    f"{module} is {list(first.factors[module].shape)} in {first.path} and "
                    f"{list(other.factors[module].shape)} in {other.path}: they are not of one base"
                )


def save_adapter(
    folder: Path, factors: Mapping[str, Factors], like: Adapter, note: Mapping[str, Any], targets: list[str]
) -> None:
    """Write an adapter folder that PEFT loads as these changes, in float32; other settings are as in `like`.

    Raises StorageError if `folder` is there already or cannot be written.
    """
    ranks = {module: each.rank for module, each in factors.items()}
    most = max(ranks.values())
    exceptions = {module: rank for module, rank in ranks.items() if rank != most}
    config = {
        **like.config,
        "r": most,
        "lora_alpha": most,  # so that what B·A is multiplied by is 1
        "use_rslora": False,
        "rank_pattern": exceptions,
        "alpha_pattern": exceptions,
        "target_modules": targets,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    tensors = {}
    for module, each in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = each.a.float().contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = each.b.float().contiguous()
    with writing(folder):
        save_file(tensors, folder / ADAPTER, {"format": "pt"})
        write_json(folder / ADAPTER_CONFIG, config)
        write_json(folder / NOTE, note)


def merge(base: Path, factors: Mapping[str, Factors], transposed: bool, folder: Path) -> None:
    """Write the base's folder again, with the changes added to its weights; they keep their dtype.

    `transposed`: weights are [in, out], as GPT-2's are (PEFT's `fan_in_fan_out`). Raises AdapterError if a
    weight is missing or of another shape, StorageError if `folder` cannot be written.
    """
    files = _weight_files(base)
    left = dict(factors)
    with writing(folder):
        for name in files:
            with opened(base / name, base) as file:
                metadata = file.metadata()
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            for module in [m for m in left if f"{m}.weight" in tensors]:
                weight, change = tensors[f"{module}.weight"], left.pop(module).delta()
                change = change.T if transposed else change
                if weight.shape != change.shape:
                    raise AdapterError(
                        f"{module} is {list(weight.shape)} in {base}, but the adapters change a weight of "
                        f"{list(change.shape)}; give the base that they were trained on"
                    )
                tensors[f"{module}.weight"] = (weight.double() + change).to(weight.dtype)
            save_file(tensors, folder / name, metadata)
        if left:
            raise AdapterError(
                f"{base} has no weight {next(iter(left))}.weight, which the adapters change; give the "
                "base that they were trained on"
            )
        for path in base.iterdir():
            if (
                path.is_file()
                and path.name not in files
                and path.suffix in {".json", ".txt", ".model", ".jinja"}
            ):
                shutil.copy2(path, folder / path.name)


def _weight_files(base: Path) -> list[str]:
    if (base / MODEL).is_file():
        return [MODEL]
    if (base / INDEX).is_file():
        names = sorted({str(name) for name in read_json(base / INDEX, base).get("weight_map", {}).values()})
        if names and all(Path(name).name == name for name in names):
            return names
    raise AdapterError(f"{base} is no model folder: it has no {MODEL}; give the folder of the adapters' base")


def _read_note(path: Path) -> Note:
    if not (path / NOTE).exists():
        return Note()
    try:
        return Note.model_validate(read_json(path / NOTE, path))
    except ValidationError as error:
        raise AdapterError(
            f"{path / NOTE}: {error.errors()[0]['msg']}; delete it if you trust the folder"
        ) from None


def read_json(file: Path, folder: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            content = json.loads(stream.read(MAX_CONFIG_BYTES))
    except FileNotFoundError:
        raise _missing(file, folder) from None
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{file} cannot be read: {error}; copy the folder again") from None
    if not isinstance(content, dict):
        raise AdapterError(f"{file} must be a JSON object; copy the folder again")
    return content


def _missing(file: Path, folder: Path) -> AdapterError:
    if not folder.is_dir():
        return AdapterError(f"{folder} is no folder; give one that PEFT or `p2ptrain` has written")
    return AdapterError(f"{folder} has no {file.name}; copy the whole folder again")


@contextmanager
def opened(file: Path, folder: Path) -> Iterator[Any]:
    if not file.is_file():
        raise _missing(file, folder)
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file} is damaged: {error}; copy the folder again") from None


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """A new folder, taken away again if it is not completed."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise StorageError(f"{folder} is there already; name a folder that is not, or delete it") from None
    except OSError as error:
        raise StorageError(f"cannot make {folder}: {error.strerror}; choose another --out") from None
    try:
        yield
    except BaseException as error:  # Ctrl-C, too, leaves nothing half-written
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise StorageError(
                f"cannot write to {folder}: {error}; make room there or choose another"
            ) from None
        raise


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
