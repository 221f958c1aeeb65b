"""The programs of a bundle: their names, tensors and axes, declared once.

The exporter names its graph inputs from this table, the bundle reader holds manifests against it,
engines check what they are given with it and tests draw random inputs from it. Axes are named:

    B  faces of one call (dynamic)        C, s  channels and side of the latent
    N  tokens of one call (dynamic)       D     width of a token
    S  side of a face crop in pixels      T, W  length and width of a conditioning sequence
    K  diffusion stages (10)              E     width of an identity embedding
    Q  coefficients of a sampler's step (8)

Images are RGB in [-1, 1]; every tensor is float32 at this interface but `timestep`, which is int64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from diffveil.errors import EngineError
from diffveil.samplers.table import COEFFICIENTS

__all__ = [
    "ALL_PROGRAMS",
    "DYNAMIC_AXES",
    "JOINED_LATER",
    "LOOP_PROGRAMS",
    "OPTIONAL_PROGRAMS",
    "PROGRAMS",
    "STAGES",
    "Dimensions",
    "ProgramSpec",
    "TensorSpec",
    "check_inputs",
]

STAGES = 10
"""Diffusion stages, each with its own conditional embedding (stage i = timestep · 10 // 1000)."""

DYNAMIC_AXES = frozenset({"B", "N"})
"""Axes whose size each call chooses; all others are fixed by the bundle."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a program.

    Attributes:
        name: Name in the ONNX graph and keyword of the call.
        axes: Named axes in order; a name in `DYNAMIC_AXES` is dynamic.
        dtype: NumPy name of the dtype at the runtime's interface.
    """

    name: str
    axes: tuple[str, ...]
    dtype: str = "float32"

    def shape(self, dimensions: Dimensions) -> tuple[int | str, ...]:
        """Sizes of the axes in order; dynamic ones stay named."""
        return tuple(a if a in DYNAMIC_AXES else dimensions.size(a) for a in self.axes)


@dataclass(frozen=True)
class ProgramSpec:
    """One program: what goes in, what comes out, what for."""

    name: str
    purpose: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a bundle's fixed axes.

    Attributes:
        image_size: Side S of a face crop in pixels.
        latent_channels: Channels C of a latent.
        latent_size: Side s of a latent.
        token_width: Width D of a stage token.
        conditioning_length: Length T of a conditioning sequence.
        conditioning_width: Width W of a conditioning sequence.
        embedding_width: Width E of an identity embedding.
        stages: Number K of stage tokens.
    """

    image_size: int
    latent_channels: int
    latent_size: int
    token_width: int
    conditioning_length: int
    conditioning_width: int
    embedding_width: int
    stages: int = STAGES

    def size(self, axis: str) -> int:
        """Size of the fixed axis named `axis`."""
        return {
            "S": self.image_size,
            "C": self.latent_channels,
            "s": self.latent_size,
            "D": self.token_width,
            "T": self.conditioning_length,
            "W": self.conditioning_width,
            "E": self.embedding_width,
            "K": self.stages,
            "Q": len(COEFFICIENTS),
            "RGB": 3,
            "ONE": 1,
        }[axis]


_IMAGE = ("B", "RGB", "S", "S")
_LATENT = ("B", "C", "s", "s")
_DENOISE_INPUTS = (
    TensorSpec("latent", _LATENT),
    TensorSpec("timestep", ("B",), "int64"),
    TensorSpec("conditioning", ("B", "T", "W")),
)
_GUIDE_INPUTS = (
    TensorSpec("x0", _LATENT),
    TensorSpec("anchor", ("B", "E")),
    TensorSpec("repel", ("B",)),
    TensorSpec("attract", ("B",)),
    TensorSpec("sibling", ("B", "B")),
)
_GUIDE_OUTPUTS = (
    TensorSpec("gradient", _LATENT),
    TensorSpec("energy", ("B",)),
    TensorSpec("embedding", ("B", "E")),
)

PROGRAMS: Mapping[str, ProgramSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            ProgramSpec(
                "encode",
                "image to scaled latent mean",
                (TensorSpec("image", _IMAGE),),
                (TensorSpec("latent", _LATENT),),
            ),
            ProgramSpec(
                "decode",
                "latent to image",
                (TensorSpec("latent", _LATENT),),
                (TensorSpec("image", _IMAGE),),
            ),
            ProgramSpec(
                "embed",
                "image to stage tokens: vision tower and MSI in one graph",
                (TensorSpec("image", _IMAGE),),
                (TensorSpec("tokens", ("B", "K", "D")),),
            ),
            ProgramSpec(
                "expand",
                "tokens to conditioning: the text encoder with its placeholder replaced",
                (TensorSpec("tokens", ("N", "D")),),
                (TensorSpec("conditioning", ("N", "T", "W")),),
            ),
            ProgramSpec(
                "denoise",
                "noise prediction of the diffusion model",
                _DENOISE_INPUTS,
                (TensorSpec("epsilon", _LATENT),),
            ),
            ProgramSpec(
                "recognize",
                "image to unit identity embedding",
                (TensorSpec("image", _IMAGE),),
                (TensorSpec("embedding", ("B", "E")),),
            ),
            ProgramSpec(
                "guide",
                "identity energy of a predicted clean latent, and its gradient",
                _GUIDE_INPUTS,
                _GUIDE_OUTPUTS,
            ),
        )
    }
)
"""Every program that all bundles hold, by name, in the order in which they are exported."""

OPTIONAL_PROGRAMS: Mapping[str, ProgramSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            ProgramSpec(
                "parse",
                "image to the probability that a pixel belongs to the face",
                (TensorSpec("image", _IMAGE),),
                (TensorSpec("face", ("B", "ONE", "S", "S")),),
            ),
            ProgramSpec(
                "denoise_few",
                "noise prediction of the diffusion model, distilled for a handful of steps",
                _DENOISE_INPUTS,
                (TensorSpec("epsilon", _LATENT),),
            ),
            ProgramSpec(
                "guide_latent",
                "what guide computes, by a recognizer distilled onto latents",
                _GUIDE_INPUTS,
                _GUIDE_OUTPUTS,
            ),
            ProgramSpec(
                "assess",
                "image to how whole the face in it looks",
                (TensorSpec("image", _IMAGE),),
                (TensorSpec("naturalness", ("B",)),),
            ),
            ProgramSpec(
                "step",
                "denoise, guidance, sampler update and background in one graph",
                (
                    TensorSpec("latent", _LATENT),
                    TensorSpec("previous", _LATENT),
                    TensorSpec("previous_epsilon", _LATENT),
                    TensorSpec("timestep", ("B",), "int64"),
                    TensorSpec("conditioning", ("B", "T", "W")),
                    TensorSpec("coefficients", ("B", "Q")),
                    TensorSpec("noise", _LATENT),
                    *_GUIDE_INPUTS[1:],
                    TensorSpec("release", ("B",)),
                    TensorSpec("normalise", ("B",)),
                    TensorSpec("background", _LATENT),
                    TensorSpec("mask", ("B", "ONE", "s", "s")),
                ),
                (
                    TensorSpec("next", _LATENT),
                    TensorSpec("epsilon", _LATENT),
                    TensorSpec("embedding", ("B", "E")),
                    TensorSpec("pushed", ("B",)),
                ),
            ),
            ProgramSpec(
                "predict",
                "where guidance is asked: the predicted clean latent, less what was gathered",
                (
                    TensorSpec("latent", _LATENT),
                    TensorSpec("epsilon", _LATENT),
                    TensorSpec("coefficients", ("B", "Q")),
                    TensorSpec("direction", _LATENT),
                    TensorSpec("reach", ("B",)),
                ),
                (TensorSpec("x0", _LATENT),),
            ),
            ProgramSpec(
                "steer",
                "adds a gradient to the direction that a step walks away from",
                (
                    TensorSpec("gradient", _LATENT),
                    TensorSpec("embedding", ("B", "E")),
                    *_GUIDE_INPUTS[1:],
                    TensorSpec("release", ("B",)),
                    TensorSpec("normalise", ("B",)),
                    TensorSpec("direction", _LATENT),
                    TensorSpec("keep", ("B",)),
                ),
                (TensorSpec("steered", _LATENT), TensorSpec("pushed", ("B",))),
            ),
            ProgramSpec(
                "advance",
                "sampler update and background",
                (
                    TensorSpec("latent", _LATENT),
                    TensorSpec("previous", _LATENT),
                    TensorSpec("epsilon", _LATENT),
                    TensorSpec("previous_epsilon", _LATENT),
                    TensorSpec("coefficients", ("B", "Q")),
                    TensorSpec("noise", _LATENT),
                    TensorSpec("direction", _LATENT),
                    TensorSpec("background", _LATENT),
                    TensorSpec("mask", ("B", "ONE", "s", "s")),
                ),
                (TensorSpec("next", _LATENT),),
            ),
        )
    }
)
"""Programs that a bundle may hold besides."""

LOOP_PROGRAMS = ("predict", "steer", "advance")
"""Optional programs without weights: what a sampling loop computes between the networks."""

JOINED_LATER = frozenset({"guide_latent", "assess", "step", *LOOP_PROGRAMS})
"""Optional programs that are made from a finished bundle; recovery keys do not depend on them."""

ALL_PROGRAMS: Mapping[str, ProgramSpec] = MappingProxyType({**PROGRAMS, **OPTIONAL_PROGRAMS})
"""Every program that there is."""


def check_inputs(
    spec: ProgramSpec, inputs: Mapping[str, NDArray[np.generic]], dimensions: Dimensions
) -> int:
    """Hold the arrays of one call against the program's declaration.

    Args:
        spec: The program.
        inputs: Arrays by input name.
        dimensions: Sizes of the bundle's fixed axes.

    Returns:
        The size of the call's dynamic axis.

    Raises:
        EngineError: Names, dtypes or shapes differ from the declaration; every difference is named.
    """
    problems = [f"{name}: not an input" for name in inputs if name not in _names(spec.inputs)]
    sizes: dict[str, int] = {}
    for tensor in spec.inputs:
        array = inputs.get(tensor.name)
        if array is None:
            problems.append(f"{tensor.name}: missing")
            continue
        expected = tensor.shape(dimensions)
        if not isinstance(array, np.ndarray):
            problems.append(f"{tensor.name}: received {type(array).__name__}, expected an array")
            continue
        if array.dtype != np.dtype(tensor.dtype):
            problems.append(f"{tensor.name}: received {array.dtype}, expected {tensor.dtype}")
        # The first tensor that mentions a dynamic axis fixes its size for the others.
        if array.ndim == len(expected):
            for axis, size in zip(expected, array.shape, strict=True):
                if isinstance(axis, str):
                    sizes.setdefault(axis, size)
        if array.shape != tuple(sizes.get(a, a) if isinstance(a, str) else a for a in expected):
            wanted = ", ".join(f"{a}={sizes[a]}" if a in sizes else f"{a}" for a in expected)
            problems.append(f"{tensor.name}: received {list(array.shape)}, expected [{wanted}]")
    if not problems and 0 in sizes.values():
        problems.append(f"{spec.inputs[0].name}: received an empty batch, expected at least one")
    if problems:
        raise EngineError(f"program '{spec.name}' was called wrongly: " + "; ".join(problems))
    return next(iter(sizes.values()))


def _names(tensors: tuple[TensorSpec, ...]) -> frozenset[str]:
    return frozenset(t.name for t in tensors)
