"""Which device and precision a peer file means, and what is seen of a device."""

from __future__ import annotations

import pytest
import torch

from p2ptrain.errors import DeviceError
from p2ptrain.gradients.devices import Found, choose_place, find_devices, is_out_of_memory, release_memory

CPU, OLD_CPU = Found("cpu", bf16=True), Found("cpu")
T4, H100 = Found("cuda:0", "Tesla T4"), Found("cuda:1", "NVIDIA H100", bf16=True)
BROKEN = Found("cuda:0", "Tesla K80", flaw="CUDA driver version is insufficient")


@pytest.mark.parametrize(
    ("device", "precision", "found", "name", "chosen"),
    [
        ("auto", "auto", [CPU], "cpu", "fp32"),
        ("auto", "auto", [CPU, T4, H100], "cuda:0", "fp16"),
        ("auto", "auto", [CPU, BROKEN, H100], "cuda:1", "bf16"),
        ("auto", "auto", [CPU, BROKEN], "cpu", "fp32"),
        ("cuda", "auto", [CPU, T4, H100], "cuda:0", "fp16"),
        ("cuda:1", "fp16", [CPU, T4, H100], "cuda:1", "fp16"),
        ("cuda:1", "fp32", [CPU, T4, H100], "cuda:1", "fp32"),
        ("cpu", "bf16", [CPU, T4], "cpu", "bf16"),
        ("cpu", "auto", [CPU, T4], "cpu", "fp32"),
    ],
)
def test_place_is_what_the_peer_file_means(
    device: str, precision: str, found: list[Found], name: str, chosen: str
) -> None:
    place = choose_place(device, precision, found)
    assert (place.found.name, place.precision) == (name, chosen)
    assert str(place.device) == name


@pytest.mark.parametrize(
    ("device", "precision", "found", "words"),
    [
        ("cuda", "auto", [CPU], r'"cuda", but torch finds only cpu on this machine; choose one'),
        ("cuda:2", "auto", [CPU, T4, H100], r"only cpu, cuda:0 \(Tesla T4\), cuda:1 \(NVIDIA H100\) on"),
        ("cuda", "auto", [CPU, BROKEN], r"cuda:0 \(Tesla K80\) does not compute: CUDA driver .*; mend its"),
        ("cpu", "bf16", [OLD_CPU], r'"bf16" would be slower than float32 on cpu, .* to "fp32" or "auto"'),
        ("cpu", "fp16", [CPU], r'"fp16" would be slower than float32 on cpu, .* to "fp32" or "auto"'),
        ("cuda", "bf16", [CPU, T4], r'"bf16" would be slower .* on cuda:0 \(Tesla T4\), .* to "fp16" or'),
    ],
)
def test_place_is_refused_with_a_remedy_when_this_machine_lacks_it(
    device: str, precision: str, found: list[Found], words: str
) -> None:
    with pytest.raises(DeviceError, match=words):
        choose_place(device, precision, found)


def test_devices_found_are_those_that_torch_has() -> None:
    found = find_devices()
    assert found[0].name == "cpu"
    accelerator = torch.accelerator.current_accelerator()
    assert len(found) == 1 + (torch.accelerator.device_count() if accelerator else 0)


def test_out_of_memory_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    release_memory(torch.device("cpu"))
