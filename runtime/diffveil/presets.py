"""The presets by name: numbers only. `diffveil.plans` says what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from diffveil.errors import OptionError
from diffveil.plans import Guidance, Inversion, Plan, Preset

__all__ = ["DEFAULT_PRESET", "PRESETS", "PSEUDONYM", "preset"]


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

# Few steps: each goes straight to what the model takes the face for, under guidance, and returns to
# the next noise level with fresh noise (LCM's step). That forgives what a step got wrong, where
# steps that carry their noise along pile it up: faces come out whole, and more steps make them
# sharper. Fresh noise alone already makes most of a stranger, so repelling may be gentle: one
# gradient of unit size a step, scaled with the noise that is left to absorb it, through the latent
# recognizer. The photo's own conditioning is for the first steps, pose and light: held on to for
# longer, it brings some of the person back. hide must arrive at one identity exactly: it takes the
# full gradient, several times a step.
_REPEL = Guidance(
    weight=((-1, 0.12),),
    normalise="rms",
    scale_with_noise=True,
    margin=-0.3,
    mode="repel",
    through="latent",
)
_ANONYMIZE = Plan(
    sampler="lcm",
    steps=11,
    strength=0.7,
    conditional_above=600,
    background_below=300,
    guidance=_REPEL,
    spacing="trailing",
    accept=0.1,
    redraws=2,
)
_HIDE = Plan(
    sampler="lcm",
    steps=14,
    strength=0.9,
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
    accept=0.6,
    redraws=1,
)


# After the first steps, a surrogate's conditioning: with it faces come out whole, without any they
# are made up from what surrounds them. A surrogate leads away from the person by itself, so that
# guidance may leave faces alone sooner, and more noise costs no wholeness. From the same step on,
# what surrounds the face is the photo's: features are drawn where the head has them.
def _drawn(plan: Plan, *, steps: int, strength: float = 0.9, guidance: Guidance) -> Plan:
    """The plan with the distilled model and surrogates; as it is on bundles that have neither."""
    few = replace(plan, distilled=True, otherwise=plan)
    repel = plan.guidance.mode == "repel"
    return replace(
        few,
        surrogate=0.5,
        background_below=600,
        accept=0.0 if repel else 0.65,
        natural=0.5 if repel else 0.55,  # 19 first draws in 20 have as much; of hidden, 3 in 5
        redraws=5,
        match_tones=True,
        steps=steps,
        strength=strength,
        guidance=guidance,
        otherwise=few,
    )


# What early steps are pushed to, later ones undo. In the last ones the full gradient, which knows
# where to push, leads a face as far with less than the latent recognizer's needs; pushed beyond
# nobody, it would become the person's opposite, which tells as much.
_LATE = (0, 550)
_AWAY = replace(
    _REPEL,
    weight=((-1, 0.06),),
    window=_LATE,
    margin=0.0,
    through="pixels",
    sibling_repeats=3,  # else gentle guidance leaves variants of a face more alike
)
# Many small pushes go where few large ones go, and smear less on the way. A margin any closer
# smears, any farther is less well known.
_KNOWN = replace(_HIDE.guidance, weight=((-1, 0.06),), window=_LATE, repeats=3, margin=0.85)


_BALANCED = Preset(
    name="balanced",
    anonymize=_drawn(_ANONYMIZE, steps=12, guidance=_AWAY),
    hide=_drawn(_HIDE, steps=14, guidance=_KNOWN),
    recovery=Inversion(sampler="o-belm", steps=8),
)

_QUICKER = replace(_ANONYMIZE, steps=7, guidance=replace(_REPEL, weight=((-1, 0.16),), margin=-0.5))
_QUICKER_HIDE = replace(_HIDE, steps=8, strength=0.8)
_FAST = Preset(
    name="fast",
    anonymize=_drawn(_QUICKER, steps=6, guidance=_AWAY),
    hide=_drawn(_QUICKER_HIDE, steps=8, strength=0.8, guidance=_KNOWN),
    recovery=Inversion(sampler="o-belm", steps=8),
)

PRESETS: Mapping[str, Preset] = MappingProxyType({p.name: p for p in (_FAST, _BALANCED, _PAPER)})
"""All presets by name."""

DEFAULT_PRESET = "fast"
"""Name of the preset that is used when none is named."""

# Unconditional throughout, and all noise: a photo's own conditioning or latent would make the new
# face another one in each photo. So little guidance that the decoy stays a face.
PSEUDONYM = Plan(
    sampler="dpm++2m",
    steps=6,
    strength=1.0,
    conditional_above=1000,
    background_below=300,
    guidance=Guidance(
        weight=((-1, 0.06),),
        normalise="rms",
        scale_with_noise=True,
        margin=0.7,
        mode="attract",
    ),
)
"""How a face becomes its decoy."""
