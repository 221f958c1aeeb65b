"""Samplers as coefficient tables.

Every sampler here is linear and explicit. With x at the current node and x_prev at the node
before it, one step is

    x_next = a0·x + a1·x_prev + b0·ε(x) + b1·ε(x_prev) + n·noise − g·gradient

and samplers differ in their coefficients only. These are computed once, on the host, in float64;
``diffveil.sampling.run`` runs any table. Symbols: α_t and σ_t are signal and noise at timestep t,
x̄ = x/α, σ̄ = σ/α; in these the probability-flow ODE is simply dx̄/dσ̄ = ε.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from diffveil.errors import OptionError
from diffveil.schedule import (
    CLEAN,
    NoiseSchedule,
    ddim_timesteps,
    trailing_timesteps,
    uniform_nodes,
)

__all__ = [
    "SamplerTable",
    "Spacing",
    "Step",
    "ddim",
    "ddim_inversion",
    "o_belm",
    "o_belm_inversion",
    "retrace",
]

Spacing = Literal["leading", "trailing"]


@dataclass(frozen=True)
class Step:
    """One row of a sampler table: x_next = a0·x + a1·x_prev + b0·ε + b1·ε_prev + n·noise − g·grad.

    Attributes:
        timestep: What the denoiser is told; also selects the conditioning. Usually the node of x,
            but the node of x_next in DDIM inversion.
        next_timestep: Node of x_next; ``CLEAN`` (-1) at the clean end.
        a0: Coefficient of x.
        a1: Coefficient of x_prev, the latent one node back.
        b0: Coefficient of ε, the prediction for x.
        b1: Coefficient of ε_prev, the prediction of the step before.
        n: Coefficient of fresh unit Gaussian noise.
        g: Weight of the guidance gradient, which is subtracted.
        x0_x: Coefficient of x in the predicted clean latent x̂0 = x0_x·x + x0_eps·ε.
        x0_eps: Coefficient of ε in the predicted clean latent.
    """

    timestep: int
    next_timestep: int
    a0: float
    a1: float
    b0: float
    b1: float
    n: float
    g: float
    x0_x: float
    x0_eps: float

    def inverse(self, next_timestep: int) -> Step:
        """The same relation between three neighbouring latents, solved for x_prev.

        Args:
            next_timestep: Node of x_prev, where the inverse step arrives.

        Raises:
            OptionError: The step does not depend on x_prev, or on more than x, x_prev and ε(x).
        """
        if self.a1 == 0.0 or self.b1 != 0.0 or self.n != 0.0 or self.g != 0.0:
            raise OptionError(
                f"the step at timestep {self.timestep} is not exactly invertible: expected "
                "a1 != 0 and neither b1, noise nor guidance"
            )
        return replace(
            self,
            next_timestep=next_timestep,
            a0=-self.a0 / self.a1,
            a1=1.0 / self.a1,
            b0=-self.b0 / self.a1,
        )


@dataclass(frozen=True)
class SamplerTable:
    """A sampler, ready to be run.

    Attributes:
        name: Sampler name, for example ``"ddim"``.
        start_timestep: Node of the latent that the table starts from; ``CLEAN`` if it is clean.
        steps: Rows in the order in which they run.
        prev_timestep: Node of the second latent of the starting pair, or None if one is enough.
    """

    name: str
    start_timestep: int
    steps: tuple[Step, ...]
    prev_timestep: int | None = None

    def __post_init__(self) -> None:
        if not self.steps:
            raise OptionError(f"sampler {self.name!r} has no steps")
        needs_pair = self.steps[0].a1 != 0.0
        if needs_pair != self.needs_pair:
            raise OptionError(
                f"sampler {self.name!r}: the first step has a1 = {self.steps[0].a1}, "
                f"but prev_timestep is {self.prev_timestep}"
            )

    @property
    def end_timestep(self) -> int:
        """Node of the latent that the table ends at."""
        return self.steps[-1].next_timestep

    @property
    def needs_pair(self) -> bool:
        """Whether the table starts from two latents, x and x_prev, rather than one."""
        return self.prev_timestep is not None

    @property
    def timesteps(self) -> tuple[int, ...]:
        """Timesteps that the denoiser is evaluated at, in order."""
        return tuple(step.timestep for step in self.steps)

    def guided(self, weight: Callable[[int, int], float]) -> SamplerTable:
        """This table with guidance weights.

        Args:
            weight: Takes the position of a step in the table and its timestep, gives its g.
        """
        steps = tuple(replace(s, g=weight(i, s.timestep)) for i, s in enumerate(self.steps))
        return replace(self, steps=steps)

    def inverse(self) -> SamplerTable:
        """The table that undoes this one: start it from the swapped final pair.

        If ``x, x_prev = run(table, …)`` then ``run(table.inverse(), x_prev, …, x_prev=x)`` ends at
        the latent that ``table`` started from. A first step that needs no x_prev (a bootstrap from
        one latent) has no counterpart: undoing the second step already arrives at its input.

        Raises:
            OptionError: A step is not exactly invertible.
        """
        undone = self.steps if self.needs_pair else self.steps[1:]
        if not undone:
            raise OptionError(f"sampler {self.name!r} is not exactly invertible")
        # nodes[k], nodes[k + 1], nodes[k + 2] are those of x_prev, x and x_next of undone[k].
        nodes = [self.start_timestep, *(step.next_timestep for step in self.steps)]
        if self.prev_timestep is not None:
            nodes.insert(0, self.prev_timestep)
        steps = [step.inverse(node) for step, node in zip(undone, nodes, strict=False)]
        return SamplerTable(
            name=self.name,
            start_timestep=nodes[-2],
            steps=tuple(reversed(steps)),
            prev_timestep=nodes[-1],
        )


def ddim(
    schedule: NoiseSchedule,
    steps: int,
    strength: float = 1.0,
    *,
    spacing: Spacing = "leading",
    eta: float = 0.0,
) -> SamplerTable:
    """DDIM from a partly noised latent to a clean one.

    Song, Meng and Ermon, "Denoising Diffusion Implicit Models", arXiv 2010.02502, equation 12.
    About ``steps · strength`` evaluations are made.

    ``"leading"`` spacing is that of the published method: of ``steps`` uniform timesteps the lowest
    k = ⌊steps · strength⌋ are visited, and the latent starts one index above them (noised to
    timestep 601, denoised at 581 … 1 for 50 steps and strength 0.6). The denoiser thus takes the
    latent for slightly cleaner than it is, which is harmless for strides of 10 or 20 timesteps and
    not for larger ones. ``"trailing"`` spacing divides the timesteps below 1000 · strength evenly
    into k = round(steps · strength) and starts exactly at the highest: right for few steps.

    Args:
        schedule: Noise schedule of the model.
        steps: Number of steps that strength 1 would make.
        strength: How much noise to start from, in (0, 1].
        spacing: Which timesteps to visit.
        eta: 0 for the deterministic sampler, 1 for as much fresh noise as DDPM.

    Raises:
        OptionError: An argument is out of range.
    """
    if not 0.0 < strength <= 1.0:
        raise OptionError(f"strength is {strength}, expected more than 0 and at most 1")
    if not 0.0 <= eta <= 1.0:
        raise OptionError(f"eta is {eta}, expected 0 to 1")
    if spacing == "leading":
        every = ddim_timesteps(steps, training_steps=schedule.steps)
        # The small term: 0.29 · 100 is 28.999… in floating point and means 29.
        count = max(1, math.floor(steps * strength + 1e-9))
        timesteps, start = every[:count], every[min(count, steps - 1)]
    elif spacing == "trailing":
        count = max(1, math.floor(steps * strength + 0.5))
        timesteps = trailing_timesteps(count, max(1, round(schedule.steps * strength)))
        start = timesteps[-1]
    else:
        raise OptionError(f"spacing is {spacing!r}, expected 'leading' or 'trailing'")
    nodes = (*reversed(timesteps), CLEAN)
    rows = tuple(_ddim_step(schedule, t, u, label=t, eta=eta) for t, u in pairwise(nodes))
    return SamplerTable("ddim", start, rows)


def ddim_inversion(schedule: NoiseSchedule, steps: int) -> SamplerTable:
    """DDIM run backwards, from a clean latent to its noise map (approximate inversion).

    Song, Meng and Ermon, arXiv 2010.02502, section 4.3. Each step from node u to the noisier node
    t uses ε(x_u, t) in place of the unknown ε(x_t, t); the error of that substitution is what
    ``ddim`` does not undo. The denoiser is told the target t, as ``ddim`` will be on the way back.

    Args:
        schedule: Noise schedule of the model.
        steps: Number of steps, the same as for the ``ddim`` that recovers.

    Raises:
        OptionError: ``steps`` is out of range.
    """
    nodes = (CLEAN, *ddim_timesteps(steps, training_steps=schedule.steps))
    rows = tuple(_ddim_step(schedule, u, t, label=t) for u, t in pairwise(nodes))
    return SamplerTable("ddim", CLEAN, rows)


def retrace(schedule: NoiseSchedule, table: SamplerTable) -> SamplerTable:
    """DDIM inversion along the nodes of another table, from the clean end up to its start.

    What it finds is the noise that `table` would turn back into the photo, were it not guided; as
    with ``ddim_inversion``, up to the error of the step length.

    Args:
        schedule: Noise schedule of the model.
        table: Starts at the first timestep that it visits, as ``"trailing"`` spacing does.

    Raises:
        OptionError: The table starts elsewhere.
    """
    if table.start_timestep != table.timesteps[0]:
        raise OptionError(
            f"sampler {table.name!r} starts at timestep {table.start_timestep} but visits "
            f"{table.timesteps[0]} first; expected the same, as with spacing 'trailing'"
        )
    nodes = (CLEAN, *reversed(table.timesteps))
    rows = tuple(_ddim_step(schedule, u, t, label=t) for u, t in pairwise(nodes))
    return SamplerTable("ddim", CLEAN, rows)


def o_belm(schedule: NoiseSchedule, steps: int) -> SamplerTable:
    """O-BELM from a pair of noisy latents to the latent that they encode.

    Wang et al., "BELM: Bidirectional Explicit Linear Multi-step Sampler for Exact Inversion in
    Diffusion Models", arXiv 2410.07273, section 4.3: of all explicit two-step relations between
    x̄_{i-1}, x̄_i, x̄_{i+1} and ε(x_i) that can be solved for either end, the one with the smallest
    local error, h³. With h_i = σ̄_i − σ̄_{i-1} and the Taylor expansions of x̄ about node i,

        x̄_{i-1} = ρ x̄_{i+1} + (1 − ρ) x̄_i − (h_i + ρ h_{i+1}) ε(x_i),   ρ = (h_i / h_{i+1})².

    Nodes 0 … ``steps`` lie uniformly over timesteps 1 … last. The table starts from x at node
    ``steps`` − 1 with x_prev at node ``steps``, and makes ``steps`` − 1 evaluations.

    Args:
        schedule: Noise schedule of the model.
        steps: Number of intervals between nodes, at least 2.

    Raises:
        OptionError: ``steps`` is out of range.
    """
    nodes = _o_belm_nodes(schedule, steps)
    rows = tuple(
        _o_belm_step(schedule, nodes[i + 1], nodes[i], nodes[i - 1])
        for i in range(steps - 1, 0, -1)
    )
    return SamplerTable("o-belm", nodes[-2], rows, prev_timestep=nodes[-1])


def o_belm_inversion(schedule: NoiseSchedule, steps: int) -> SamplerTable:
    """O-BELM from one encoded latent to the pair of noisy latents that encodes it exactly.

    The inverse of ``o_belm`` after one DDIM step from node 0 to node 1, which makes the first pair.
    That step's error does not matter to the round trip: ``o_belm`` arrives at node 0 without it.
    ``steps`` evaluations; ends with x at node ``steps`` and x_prev at node ``steps`` − 1, so swap
    the two to recover.

    Args:
        schedule: Noise schedule of the model.
        steps: Number of intervals between nodes, the same as for ``o_belm``.

    Raises:
        OptionError: ``steps`` is out of range.
    """
    nodes = _o_belm_nodes(schedule, steps)
    bootstrap = _ddim_step(schedule, nodes[0], nodes[1], label=nodes[0])
    rows = (bootstrap, *o_belm(schedule, steps).inverse().steps)
    return SamplerTable("o-belm", nodes[0], rows)


def _o_belm_nodes(schedule: NoiseSchedule, steps: int) -> Sequence[int]:
    if not 2 <= steps < schedule.steps - 1:
        raise OptionError(f"o-belm steps is {steps}, expected 2 to {schedule.steps - 2}")
    return uniform_nodes(steps + 1, first=1, last=schedule.steps - 1)


def _ddim_step(
    schedule: NoiseSchedule, here: int, there: int, *, label: int, eta: float = 0.0
) -> Step:
    """DDIM from node ``here`` to node ``there``, in either direction."""
    alpha, sigma = schedule.signal(here), schedule.noise(here)
    alpha_next, sigma_next = schedule.signal(there), schedule.noise(there)
    fresh = 0.0
    if eta > 0.0:
        # Equation 16 of the paper, with its ᾱ being α².
        ratio = alpha / alpha_next
        fresh = eta * (sigma_next / sigma) * math.sqrt(max(0.0, 1.0 - ratio * ratio))
    kept = math.sqrt(max(0.0, sigma_next * sigma_next - fresh * fresh))
    return Step(
        timestep=label,
        next_timestep=there,
        a0=alpha_next / alpha,
        a1=0.0,
        b0=kept - alpha_next * sigma / alpha,
        b1=0.0,
        n=fresh,
        g=0.0,
        x0_x=1.0 / alpha,
        x0_eps=-sigma / alpha,
    )


def _o_belm_step(schedule: NoiseSchedule, back: int, here: int, there: int) -> Step:
    """O-BELM from x_prev at node ``back`` and x at node ``here`` to node ``there``."""
    (alpha_back, ratio_back), (alpha, ratio), (alpha_next, ratio_next) = (
        (schedule.signal(t), schedule.noise(t) / schedule.signal(t)) for t in (back, here, there)
    )
    h_next = ratio - ratio_next
    h_back = ratio_back - ratio
    rho = (h_next / h_back) ** 2
    return Step(
        timestep=here,
        next_timestep=there,
        a0=(1.0 - rho) * alpha_next / alpha,
        a1=rho * alpha_next / alpha_back,
        b0=-(h_next + rho * h_back) * alpha_next,
        b1=0.0,
        n=0.0,
        g=0.0,
        x0_x=1.0 / alpha,
        x0_eps=-ratio,
    )
