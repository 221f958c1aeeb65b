"""The presets by name: numbers only. `diffveil.plans` says what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from diffveil.errors import OptionError
from diffveil.plans import Guidance, Inversion, Plan, Preset

__all__ = ["DEFAULT_PRESET", "PRESETS", "preset"]


def preset(name: str) -> Preset:
    """Preset of that name.

    Raises:
        OptionError: There is none.
    """
    try:
        return PRESETS[name]
    except KeyError:
        names = ", ".join(sorted(PRESETS))
        raise OptionError(f"preset is {name!r}, expected one of: {names}") from None


# He et al., "Diff-Privacy: Diffusion-based Face Privacy Protection", arXiv 2309.05330: the steps,
# strengths, thresholds and weights of the published method.
_PAPER = Preset(
    name="paper",
    anonymize=Plan(
        sampler="ddim",
        steps=50,
        strength=0.6,
        conditional_above=400,
        background_below=300,
        guidance=Guidance(weight=((-1, 1.0),), mode="repel"),
        spacing="leading",
        background="clean",
    ),
    hide=Plan(
        sampler="ddim",
        steps=100,
        strength=0.8,
        conditional_above=600,
        background_below=0,
        guidance=Guidance(weight=((600, 1.5), (-1, 2.5)), mode="attract"),
        spacing="leading",
    ),
    recovery=Inversion(sampler="ddim", steps=100),
)

# Fewer steps, so each must steer further: gradients of unit size, scaled with the noise that is
# left to absorb them, until the face is clearly somebody else (or, to hide, still the person).
# Starting from the photo's own noise keeps light, pose and texture; fresh noise takes the rest.
_BALANCED = Preset(
    name="balanced",
    anonymize=Plan(
        sampler="ddim",
        steps=12,
        strength=0.65,
        conditional_above=400,
        background_below=300,
        guidance=Guidance(
            weight=((-1, 0.12),),
            normalise="rms",
            scale_with_noise=True,
            margin=-0.4,
            mode="repel",
        ),
        spacing="trailing",
        fresh_noise=0.7,
    ),
    hide=Plan(
        sampler="ddim",
        steps=20,
        strength=0.8,
        conditional_above=600,
        background_below=0,
        guidance=Guidance(
            weight=((-1, 0.1),),
            normalise="rms",
            scale_with_noise=True,
            margin=0.8,
            mode="attract",
        ),
        spacing="trailing",
        fresh_noise=0.8,
    ),
    recovery=Inversion(sampler="o-belm", steps=8),
)

# Steered through the latent recognizer, which costs so little that it is asked several times a
# step. Fresh noise alone already makes most of a stranger, so guidance need only see to the rest,
# and may be gentle: that is what keeps faces natural. hide must arrive at one identity exactly: it
# takes the full gradient and second-order steps of the ordinary model, because the distilled one
# keeps less of the identity. So does anonymize take them on bundles without a distilled denoiser.
_FAST_ANONYMIZE = Plan(
    sampler="dpm++2m",
    steps=5,
    strength=0.8,
    conditional_above=400,
    background_below=300,
    guidance=Guidance(
        weight=((-1, 0.06),),
        normalise="rms",
        scale_with_noise=True,
        margin=-0.2,
        mode="repel",
        through="latent",
        repeats=3,
    ),
    spacing="trailing",
)
_FAST_HIDE = Plan(
    sampler="dpm++2m",
    steps=5,
    strength=0.8,
    conditional_above=600,
    background_below=300,
    guidance=Guidance(
        weight=((-1, 0.12),),
        normalise="rms",
        scale_with_noise=True,
        margin=0.9,
        mode="attract",
        repeats=2,
    ),
    spacing="trailing",
)
_FAST = Preset(
    name="fast",
    anonymize=replace(
        _FAST_ANONYMIZE,
        sampler="lcm",
        steps=4,
        guidance=replace(_FAST_ANONYMIZE.guidance, weight=((-1, 0.15),), margin=-0.45, repeats=4),
        distilled=True,
        otherwise=_FAST_ANONYMIZE,
    ),
    hide=_FAST_HIDE,
    recovery=Inversion(sampler="o-belm", steps=8),
)

PRESETS: Mapping[str, Preset] = MappingProxyType({p.name: p for p in (_FAST, _BALANCED, _PAPER)})
"""All presets by name."""

DEFAULT_PRESET = "fast"
"""Name of the preset that is used when none is named."""
