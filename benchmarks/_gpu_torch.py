"""The published recipe and a GAN in PyTorch, eager and compiled: what stands beside ours."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import torch

from benchmarks._gpu_bundle import Size
from benchmarks._gpu_gan import GanAnonymizer
from diffveil_export import oracle
from diffveil_export.components import Components

__all__ = ["DTYPES", "gan_cases", "matmul_ceiling", "paper_cases", "torch_device", "wait_for"]

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

Mode = Literal["eager", "compile"]


def torch_device() -> torch.device:
    """The GPU, or the CPU where there is none that PyTorch can use."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait_for(device: torch.device) -> Callable[[], object]:
    """What returns when the device has done its work."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def matmul_ceiling(device: torch.device, dtype: torch.dtype, side: int) -> tuple[Any, float]:
    """A product of two square matrices, and its operations: the most that a device reaches."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return lambda: a @ b, 2.0 * side**3


def paper_cases(
    components: Components,
    device: torch.device,
    dtype: str,
    modes: tuple[Mode, ...],
    batches: tuple[int, ...],
    compiler: str,
) -> Iterator[tuple[str, Mode, int, Callable[[], object]]]:
    """The recipe's anonymize, hide and recover with autograd, channels last, PyTorch's own SDPA.

    Args:
        components: The networks; moved and cast in place.
        device: Where they run.
        dtype: What they compute in.
        modes: As they are, or compiled.
        batches: Faces of a call.
        compiler: Back end of `torch.compile`.

    Yields:
        Operation, mode, batch and a call.
    """
    components = components.to(DTYPES[dtype])
    for module in components.modules().values():
        module.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    components = replace(components, unconditional=components.unconditional.to(device))
    d = components.dimensions
    for mode in modes:
        if mode == "compile":
            for module in components.modules().values():
                module.compile(backend=compiler, dynamic=False)
        for batch in batches:
            torch._dynamo.reset()  # each size compiled for itself, none for all
            shape = (batch, 3, d.image_size, d.image_size)
            photo = torch.rand(shape, device=device, dtype=DTYPES[dtype]) * 2 - 1
            photo = photo.to(memory_format=torch.channels_last)
            noise = torch.randn(
                (batch, 1, d.latent_channels, d.latent_size, d.latent_size),
                device=device,
                dtype=DTYPES[dtype],
            )
            yield "anonymize", mode, batch, _on(device, oracle.anonymize, components, photo, noise)
            yield "hide", mode, batch, _on(device, oracle.hide, components, photo, noise)
            yield "recover", mode, batch, _on(device, _there_and_back, components, photo)


def gan_cases(
    size: Size,
    device: torch.device,
    dtype: str,
    modes: tuple[Mode, ...],
    batches: tuple[int, ...],
    compiler: str,
) -> Iterator[tuple[str, Mode, int, Callable[[], object]]]:
    """Encoder and generator of a GAN's size; arguments and what is yielded as `paper_cases`."""
    network = GanAnonymizer(size.generator, size.encoder).eval().requires_grad_(False)
    network = network.to(device, DTYPES[dtype])
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for mode in modes:
        chosen: Any = network
        if mode == "compile":
            chosen = torch.compile(copy.copy(network), backend=compiler, dynamic=False)
        for batch in batches:
            torch._dynamo.reset()
            side = size.encoder[0]
            photo = torch.rand((batch, 3, side, side), device=device, dtype=DTYPES[dtype]) * 2 - 1
            photo = photo.to(memory_format=torch.channels_last)

            def call(chosen: Any = chosen, photo: torch.Tensor = photo) -> object:
                with torch.inference_mode():
                    return chosen(photo)

            yield "anonymize", mode, batch, call


def _on(
    device: torch.device, function: Callable[..., object], *arguments: object
) -> Callable[[], object]:
    """The recipe makes small tensors where PyTorch makes them by default."""

    def call() -> object:
        with torch.device(device):
            return function(*arguments)

    return call


def _there_and_back(components: Components, photo: torch.Tensor) -> object:
    """The recovery key by inversion, and the photo out of it, 100 steps each."""
    return oracle.recover(components, *oracle.invert(components, photo))
