"""Plans: every number of an operation in one frozen, validated place.

A plan turns into sampler tables (``Plan.table``, ``Inversion.forward``, ``Inversion.recovery``);
nothing else in the runtime knows a step count, a weight or a threshold. Timesteps run from 999,
all noise, to 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from diffveil.errors import OptionError
from diffveil.samplers import (
    SPACINGS,
    SamplerTable,
    Spacing,
    bdia,
    bdia_inversion,
    ddim,
    ddim_inversion,
    dpm_solver,
    lcm,
    o_belm,
    o_belm_inversion,
    tcd,
)
from diffveil.schedule import NoiseSchedule

__all__ = ["Guidance", "Inversion", "Plan", "Preset"]

_TIMESTEPS = 1000
_MOST_REPEATS = 100
_MOST_REDRAWS = 16
_SAMPLERS: Mapping[str, Callable[..., SamplerTable]] = MappingProxyType(
    {"ddim": ddim, "dpm++2m": dpm_solver, "lcm": lcm, "tcd": tcd}
)
_INVERSIONS: Mapping[str, tuple[Callable[..., SamplerTable], Callable[..., SamplerTable]]] = (
    MappingProxyType(
        {
            "o-belm": (o_belm_inversion, o_belm),
            "bdia": (bdia_inversion, bdia),
            "ddim": (ddim_inversion, ddim),
        }
    )
)


@dataclass(frozen=True)
class Guidance:
    """How the gradient of the identity energy steers sampling.

    Attributes:
        weight: Pairs of a timestep and a weight that holds above it, highest timestep first. Below
            the last pair's timestep there is no guidance; -1 there means everywhere.
        normalise: ``"rms"`` divides each face's gradient by its root mean square, so that a weight
            means the same for every photo; ``"none"`` leaves it.
        scale_with_noise: Multiply the weight by the noise level σ_t of the step.
        margin: A face is left alone while its cosine similarity to the photo is already beyond
            this: at or below it to repel, at or above it to attract. None: always guided.
        every: Ask for a gradient at every so many steps, counted from the first.
        reuse: At the steps between, use the last gradient again rather than none.
        window: Guide at timesteps t with window[0] <= t <= window[1].
        mode: ``"repel"`` from the photo's identity or ``"attract"`` to it.
        through: What the gradient goes through: decoder and recognizer (``"pixels"``), or the
            recognizer distilled onto latents (``"latent"``), where the bundle has one.
        repeats: Gradients a step, each taken where the one before has led. Faces that are beyond
            the margin take part no longer.
        sibling_repeats: At least so many where several variants of a face repel each other: what
            leads a face away from its photo does not lead variants apart.

    Raises:
        OptionError: Attributes are out of range; the message names all that are.
    """

    weight: tuple[tuple[int, float], ...]
    normalise: Literal["none", "rms"] = "none"
    scale_with_noise: bool = False
    margin: float | None = None
    every: int = 1
    window: tuple[int, int] = (0, _TIMESTEPS)
    mode: Literal["repel", "attract"] = "repel"
    reuse: bool = False
    through: Literal["pixels", "latent"] = "pixels"
    repeats: int = 1
    sibling_repeats: int = 1

    def __post_init__(self) -> None:
        problems = []
        bounds = [above for above, _ in self.weight]
        if not self.weight or bounds != sorted(set(bounds), reverse=True):
            problems.append(f"weight timesteps are {bounds}, expected one or more, falling")
        if any(not -1 <= above < _TIMESTEPS for above in bounds):
            problems.append(f"weight timesteps are {bounds}, expected -1 to {_TIMESTEPS - 1}")
        weights = [weight for _, weight in self.weight]
        if any(not math.isfinite(weight) or weight < 0.0 for weight in weights):
            problems.append(f"weights are {weights}, expected finite numbers of at least 0")
        if self.normalise not in ("none", "rms"):
            problems.append(f"normalise is {self.normalise!r}, expected 'none' or 'rms'")
        if self.margin is not None and not -1.0 <= self.margin <= 1.0:
            problems.append(f"margin is {self.margin}, expected -1 to 1, or None")
        if self.every < 1:
            problems.append(f"every is {self.every}, expected at least 1")
        if not 0 <= self.window[0] <= self.window[1] <= _TIMESTEPS:
            problems.append(f"window is {self.window}, expected 0 <= low <= high <= {_TIMESTEPS}")
        if self.mode not in ("repel", "attract"):
            problems.append(f"mode is {self.mode!r}, expected 'repel' or 'attract'")
        if self.through not in ("pixels", "latent"):
            problems.append(f"through is {self.through!r}, expected 'pixels' or 'latent'")
        if not 1 <= self.repeats <= _MOST_REPEATS:
            problems.append(f"repeats is {self.repeats}, expected 1 to {_MOST_REPEATS}")
        if not 1 <= self.sibling_repeats <= _MOST_REPEATS:
            problems.append(
                f"sibling_repeats is {self.sibling_repeats}, expected 1 to {_MOST_REPEATS}"
            )
        _report("guidance", problems)

    def weight_at(self, index: int, timestep: int, noise_level: float) -> float:
        """Weight of the gradient at one step.

        Args:
            index: Position of the step, from 0.
            timestep: Timestep of the step.
            noise_level: σ_t of that timestep.

        Returns:
            The weight; 0 where the step is not guided.
        """
        skipped = index % self.every and not self.reuse
        if skipped or not self.window[0] <= timestep <= self.window[1]:
            return 0.0
        weight = next((weight for above, weight in self.weight if timestep > above), 0.0)
        return weight * noise_level if self.scale_with_noise else weight


@dataclass(frozen=True)
class Plan:
    """How to make a protected face out of a photo's.

    Attributes:
        sampler: ``"ddim"``, ``"dpm++2m"``, or for distilled models ``"lcm"`` or ``"tcd"``.
        steps: Steps that strength 1 would make; ``steps · strength`` are made.
        strength: How much noise the photo's latent starts with, in (0, 1].
        conditional_above: The photo's own conditioning holds at timesteps above this, the
            unconditional one (or a surrogate's) at the others.
        background_below: The background is reset to the photo's at timesteps below this; 0: never.
        guidance: Identity guidance.
        spacing: Which timesteps are visited: ``"leading"``, ``"trailing"``, ``"karras"`` or
            ``"ays"``; see ``diffveil.samplers.nodes``.
        fresh_noise: Share f of fresh noise in what the latent is noised with, in [0, 1]. The rest
            is the photo's own noise map, found by DDIM inversion along the same timesteps:
            √(1 − f²)·own + f·fresh. 1 is the published method. Less keeps more of what makes the
            photo look like a photograph, and leaves the change of identity to the guidance; needs
            another spacing than ``"leading"``.
        distilled: Sample with `denoise_few`, the model distilled for few steps.
        surrogate: Share s of a surrogate in the tokens that hold where the photo's own do not, in
            [0, 1]: s·surrogate + (1 − s)·own; 0: the unconditional conditioning holds there.
        match_tones: Give drawn faces the mean and spread of the photo's colours.
        accept: Cosine similarity of a drawn face to the photo's identity, as the recognizer sees
            it: at most this to repel, at least this to attract. Faces beyond it are drawn again.
            None: every face is taken.
        natural: Naturalness of a drawn face, 0 … 1, as `assess` sees it: faces below it are drawn
            again. 0, or a bundle without `assess`: looks are not asked for.
        redraws: How many times at most. Of all draws, one that meets `accept` is kept before one
            that does not; among those the most natural, or without `assess` the first.
        otherwise: The plan that takes this one's place on bundles without `denoise_few` or without
            surrogates, whichever it asks for; None to do by the same numbers without them.
        background: What the background is reset to: the photo's latent ``"noised"`` as far as the
            face is at that step, or always ``"clean"`` as in the published method.

    Raises:
        OptionError: Attributes are out of range; the message names all that are.
    """

    sampler: Literal["ddim", "dpm++2m", "lcm", "tcd"]
    steps: int
    strength: float
    conditional_above: int
    background_below: int
    guidance: Guidance
    spacing: Spacing = "trailing"
    background: Literal["noised", "clean"] = "noised"
    fresh_noise: float = 1.0
    distilled: bool = False
    surrogate: float = 0.0
    match_tones: bool = False
    accept: float | None = None
    natural: float = 0.0
    redraws: int = 0
    otherwise: Plan | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.sampler not in _SAMPLERS:
            names = ", ".join(map(repr, _SAMPLERS))
            problems.append(f"sampler is {self.sampler!r}, expected one of {names}")
        if not 1 <= self.steps < _TIMESTEPS:
            problems.append(f"steps is {self.steps}, expected 1 to {_TIMESTEPS - 1}")
        if not 0.0 < self.strength <= 1.0:
            problems.append(f"strength is {self.strength}, expected more than 0 and at most 1")
        if not -1 <= self.conditional_above <= _TIMESTEPS:
            problems.append(
                f"conditional_above is {self.conditional_above}, expected -1 to {_TIMESTEPS}"
            )
        if not 0 <= self.background_below <= _TIMESTEPS:
            problems.append(
                f"background_below is {self.background_below}, expected 0 to {_TIMESTEPS}"
            )
        if self.spacing not in SPACINGS:
            names = ", ".join(map(repr, SPACINGS))
            problems.append(f"spacing is {self.spacing!r}, expected one of {names}")
        if self.background not in ("noised", "clean"):
            problems.append(f"background is {self.background!r}, expected 'noised' or 'clean'")
        if not 0.0 <= self.fresh_noise <= 1.0:
            problems.append(f"fresh_noise is {self.fresh_noise}, expected 0 to 1")
        elif self.fresh_noise < 1.0 and self.spacing == "leading":
            problems.append("fresh_noise below 1 needs another spacing than 'leading'")
        elif self.fresh_noise < 1.0 and self.surrogate:
            problems.append("fresh_noise below 1 keeps what a surrogate is to replace")
        if not 0.0 <= self.surrogate <= 1.0:
            problems.append(f"surrogate is {self.surrogate}, expected 0 to 1")
        if self.accept is not None and not -1.0 <= self.accept <= 1.0:
            problems.append(f"accept is {self.accept}, expected -1 to 1, or None")
        if not 0.0 <= self.natural <= 1.0:
            problems.append(f"natural is {self.natural}, expected 0 to 1")
        if not 0 <= self.redraws <= _MOST_REDRAWS:
            problems.append(f"redraws is {self.redraws}, expected 0 to {_MOST_REDRAWS}")
        if self.redraws and self.accept is None and not self.natural:
            problems.append("redraws is given, but accept and natural take every face")
        if self.otherwise is not None:
            if not self.distilled and not self.surrogate:
                problems.append("otherwise is given, but the plan asks for nothing")
            if self.otherwise.guidance.mode != self.guidance.mode:
                problems.append("otherwise guides the other way")
        _report("plan", problems)

    def fitting(self, has_few: bool, has_surrogates: bool) -> Plan:
        """The plan to follow on a bundle, given whether it has `denoise_few` and surrogates."""
        few = self.distilled and has_few
        surrogate = self.surrogate if has_surrogates else 0.0
        if (few, surrogate) == (self.distilled, self.surrogate):
            return self
        if self.otherwise is not None:
            return self.otherwise.fitting(has_few, has_surrogates)
        return replace(self, distilled=few, surrogate=surrogate)

    def table(self, schedule: NoiseSchedule) -> SamplerTable:
        """Sampler table with the guidance weights filled in."""
        make = _SAMPLERS[self.sampler]
        table = make(schedule, self.steps, self.strength, spacing=self.spacing)
        return table.guided(
            lambda index, timestep: self.guidance.weight_at(
                index, timestep, schedule.noise(timestep)
            )
        )


@dataclass(frozen=True)
class Inversion:
    """How a photo's latent becomes a noise map, and the noise map the latent again.

    Attributes:
        sampler: ``"o-belm"`` or ``"bdia"``, exact, two latents; or ``"ddim"``, approximate, one.
        steps: Number of steps.

    Raises:
        OptionError: Attributes are out of range; the message names all that are.
    """

    sampler: Literal["o-belm", "bdia", "ddim"]
    steps: int

    def __post_init__(self) -> None:
        problems = []
        if self.sampler not in _INVERSIONS:
            names = ", ".join(map(repr, _INVERSIONS))
            problems.append(f"sampler is {self.sampler!r}, expected one of {names}")
        least, most = self.latents, _TIMESTEPS - self.latents
        if not least <= self.steps <= most:
            problems.append(f"steps is {self.steps}, expected {least} to {most}")
        _report("inversion", problems)

    @property
    def latents(self) -> int:
        """Number of latents that the noise map consists of."""
        return 1 if self.sampler == "ddim" else 2

    def forward(self, schedule: NoiseSchedule) -> SamplerTable:
        """Table from the photo's latent to the noise map."""
        return _INVERSIONS[self.sampler][0](schedule, self.steps)

    def recovery(self, schedule: NoiseSchedule) -> SamplerTable:
        """Table from the noise map to the photo's latent.

        The exact ones start from the final pair of ``forward`` *swapped*: x and x_prev change
        places.
        """
        return _INVERSIONS[self.sampler][1](schedule, self.steps)


@dataclass(frozen=True)
class Preset:
    """Numbers of all three operations.

    Attributes:
        name: Name that users choose it by.
        anonymize: Plan of ``anonymize``; its guidance repels.
        hide: Plan of ``hide``; its guidance attracts.
        recovery: Inversion that makes recovery keys, and its way back.

    Raises:
        OptionError: A plan's guidance points the wrong way.
    """

    name: str
    anonymize: Plan
    hide: Plan
    recovery: Inversion

    def __post_init__(self) -> None:
        problems = []
        # Swapped plans would publish the identity that they should remove.
        if self.anonymize.guidance.mode != "repel":
            problems.append("anonymize guidance mode is 'attract', expected 'repel'")
        if self.hide.guidance.mode != "attract":
            problems.append("hide guidance mode is 'repel', expected 'attract'")
        _report(f"preset {self.name!r}", problems)

    def with_(
        self,
        *,
        steps: int | None = None,
        strength: float | None = None,
        recovery_steps: int | None = None,
    ) -> Preset:
        """This preset with some numbers replaced; None keeps the preset's own.

        Args:
            steps: Steps of anonymize and hide.
            strength: Strength of anonymize and hide, in (0, 1].
            recovery_steps: Steps of inversion and recovery.

        Raises:
            OptionError: A number is out of range.
        """

        def changed(plan: Plan) -> Plan:
            return replace(
                plan,
                steps=plan.steps if steps is None else steps,
                strength=plan.strength if strength is None else strength,
                otherwise=plan.otherwise and changed(plan.otherwise),
            )

        recovery = self.recovery
        if recovery_steps is not None:
            recovery = replace(recovery, steps=recovery_steps)
        return replace(
            self, anonymize=changed(self.anonymize), hide=changed(self.hide), recovery=recovery
        )


def _report(what: str, problems: list[str]) -> None:
    if problems:
        raise OptionError(f"{what}: " + "; ".join(problems))
