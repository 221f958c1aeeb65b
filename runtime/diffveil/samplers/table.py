"""Samplers as coefficient tables.

Every sampler here is linear and explicit. With x at the current node and x_prev at the node
before it, one step is

    x_next = a0·x + a1·x_prev + b0·ε(x) + b1·ε(x_prev) + n·noise − g·gradient

and samplers differ in their coefficients only. These are computed once, on the host, in float64;
``diffveil.sampling.run`` runs any table. Symbols: α_t and σ_t are signal and noise at timestep t,
x̄ = x/α, σ̄ = σ/α; in these the probability-flow ODE is simply dx̄/dσ̄ = ε.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from diffveil.errors import OptionError

__all__ = ["COEFFICIENTS", "SamplerTable", "Step"]

COEFFICIENTS = ("a0", "a1", "b0", "b1", "n", "g", "x0_x", "x0_eps")
"""Numbers of a step in the order in which program `step` takes them."""


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

    @property
    def coefficients(self) -> tuple[float, ...]:
        """Its numbers, in the order of `COEFFICIENTS`."""
        return tuple(getattr(self, name) for name in COEFFICIENTS)

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
