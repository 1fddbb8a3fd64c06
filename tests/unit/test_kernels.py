"""The same bits on every kernel that torch chooses between: what invariant I2 rests on across machines.

torch picks its kernels once, when it first needs one. So a child that has only imported torch is forked once
per capability, each fork sets `ATEN_CPU_CAPABILITY` before its first operation, and tells what it computed.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

import pytest

from p2ptrain.gradients.codecs import CODECS

CAPABILITIES = ("default", "avx2", "avx512")

CHILD = """
import hashlib, json, os, sys
from pathlib import Path
import numpy as np, torch
from p2ptrain.config import Optimizer, Outer as OuterConfig
from p2ptrain.gradients.aggregation import AGGREGATIONS, mean_chunk, norm_clip
from p2ptrain.gradients.codecs import CODECS, codec_named
from p2ptrain.replica.optimizers import build_optimizer
from p2ptrain.replica.outer import Outer

NUMEL = 20_011  # no multiple of a vector register


TENSORS = [(0, 7), (7, 10_005), (10_005, NUMEL)]


def train(kind, every=0):
    # Uniform numbers of numpy are the same everywhere; torch.randn is not, not even on one machine.
    random, codec = np.random.default_rng(7), codec_named("fp16")
    draw = lambda: torch.from_numpy(random.random(NUMEL, np.float32) - np.float32(0.5))
    parameters, mean = draw(), torch.empty(NUMEL)
    optimizer = build_optimizer(Optimizer(kind=kind, weight_decay=0.1), TENSORS, TENSORS[:2])
    outer = Outer(OuterConfig(every=every), parameters) if every else None
    for step in range(30):
        totals = [draw().mul_(torch.tensor(0.5**step)) for _ in range(3)]
        codec.decode(codec.encode(mean_chunk(totals, [3, 7, 5])), mean)
        optimizer.step(parameters, mean, 0.01 / (step + 1))
        if outer:
            outer.after(step + 1, parameters)
    state = optimizer.state_tensors() | (outer.state_tensors() if outer else {})
    tensors = [parameters, *(tensor for _, tensor in sorted(state.items()))]
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def decoded(folder):
    # What the first child encoded, all of them decode: encoders may differ, as a peer's own are its own.
    digests = {}
    for codec in CODECS.values():
        path = folder / codec.name
        if not path.exists():
            values = np.random.default_rng(9).standard_normal(NUMEL, np.float32)
            sizes = np.float32(2.0) ** np.random.default_rng(10).integers(-40, 40, NUMEL // 500 + 1)
            values *= np.repeat(sizes.astype(np.float32), 500)[:NUMEL]
            path.write_bytes(codec.encode(torch.from_numpy(values)))
        out = torch.empty(NUMEL)
        codec.decode(path.read_bytes(), out)
        digests[codec.name] = hashlib.sha256(out.numpy().tobytes()).hexdigest()
    return digests
def robust():
    random = np.random.default_rng(9)
    draw = lambda: torch.from_numpy(random.random(NUMEL, np.float32) - np.float32(0.5))
    found = hashlib.sha256()
    for members in (3, 5, 8):
        totals = [draw().mul_(torch.tensor(2.0**at)) * draw().relu().sign() for at in range(members)]
        for name in sorted(AGGREGATIONS.keys() - {"mean", "norm_clip"}):
            found.update(AGGREGATIONS[name](totals, range(1, 3 * members, 3)).numpy().tobytes())
        found.update(norm_clip(totals, range(1, 3 * members, 3), 0.7).numpy().tobytes())
    return found.hexdigest()


def wrong_bits():
    # float64 has more than twice the bits of float32, so rounding its result once more is still exact
    bits = np.random.default_rng(8).integers(0, 2**32, (2, 200_003), np.uint32)
    x, y = (np.where(np.isfinite(each), each, np.float32(1)) for each in bits.view(np.float32))
    X, Y, scalar = torch.from_numpy(x), torch.from_numpy(y), torch.tensor(1.37)
    dx, dy, ds = x.astype(np.float64), y.astype(np.float64), float(scalar)
    cases = {
        "add": (X + Y, dx + dy),
        "sub": (X - Y, dx - dy),
        "mul": (X * Y, dx * dy),
        "div": (X / Y, dx / dy),
        "add a scalar": (X.clone().add_(scalar), dx + ds),
        "mul by a scalar": (X.clone().mul_(scalar), dx * ds),
        "div by a scalar": (X.clone().div_(scalar), dx / ds),
        "sqrt": (torch.from_numpy(np.sqrt(np.abs(x))), np.sqrt(np.abs(dx))),
        "to fp16": (X.half().float(), x.astype(np.float16).astype(np.float64)),
    }
    return {
        name: int(np.sum((ours.numpy() != exact.astype(np.float32)) & ~np.isnan(exact)))
        for name, (ours, exact) in cases.items()
    }


np.seterr(all="ignore")
for capability in sys.argv[2:]:
    sys.stdout.flush()
    if not (child := os.fork()):
        os.environ["ATEN_CPU_CAPABILITY"] = capability
        torch.set_num_threads(1)
        result = {kind: train(kind) for kind in ("adamw", "sgd", "lamb")}
        result |= {"outer": train("sgd", every=7), "robust": robust()}
        result["wrong bits"] = wrong_bits()
        result["decoded"] = decoded(Path(sys.argv[1]))
        result["capability"] = torch.backends.cpu.get_cpu_capability().lower()
        print(json.dumps({capability: result}), flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"the child for {capability} failed")
"""


@functools.cache
def computed() -> dict[str, Any]:
    """What a child of each capability computed. Run once for all tests of this file."""
    environment = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.run(
            [sys.executable, "-c", CHILD, folder, *CAPABILITIES],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert child.returncode == 0, child.stderr
    results: dict[str, Any] = {}
    for line in child.stdout.splitlines():
        results |= json.loads(line)
    return results


def result_of(capability: str) -> dict[str, Any]:
    result: dict[str, Any] = computed()[capability]
    if result["capability"] != capability:
        pytest.skip(
            f"NOT COMPARED: this processor has no {capability} kernels, it ran {result['capability']}"
        )
    return result


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kind", ["adamw", "sgd", "lamb", "outer"])
def test_30_steps_of_training_end_in_the_same_state_when_the_kernels_differ(
    kind: str, capability: str
) -> None:
    assert result_of(capability)[kind] == PINNED[kind]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_aggregation_that_bounds_a_liar_gives_the_same_bytes_when_the_kernels_differ(capability: str) -> None:
    assert result_of(capability)["robust"] == PINNED["robust"]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_operation_of_apply_rounds_exactly_once_when_checked_against_float64(capability: str) -> None:
    wrong = result_of(capability)["wrong bits"]
    assert wrong == dict.fromkeys(wrong, 0)


@pytest.mark.parametrize("capability", CAPABILITIES[1:])
@pytest.mark.parametrize("codec", CODECS)
def test_codec_decodes_to_the_same_bits_when_the_kernels_differ(codec: str, capability: str) -> None:
    assert result_of(capability)["decoded"][codec] == result_of("default")["decoded"][codec]


PINNED = {
    "adamw": "8970ecd957e608ec4c982f2eb1ce9c58fa553c8333e00023995198d05e7ff71d",
    "sgd": "a6278c30f51b2d87f95d86b01e8a658a15ca5fe4b23f69da476edb3b0a098ab5",
    "lamb": "73faa073e64006e81548c07a5525c3feafef250aa35efef509f72c771bd37ac3",
    "outer": "2d1b1753d48881f17e4191bd6b22833c2c903389b304e2c23badaa47549ff1f0",
    "robust": "5296a2404f25a504607c93e43693295beea12b85ec7b1986f1332d7ad62ca953",
}
"""SHA-256 of parameters and optimizer state, and of what the robust rules give, on every machine. Whoever
must change these raises `PROTOCOL_VERSION` too: peers of the two versions would drift apart."""
