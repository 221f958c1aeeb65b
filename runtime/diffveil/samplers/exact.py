"""What the exactly invertible samplers share: their nodes, and how the first pair is made."""

from __future__ import annotations

from dataclasses import replace

from diffveil.errors import OptionError
from diffveil.samplers.ddim import ddim_step
from diffveil.samplers.table import SamplerTable
from diffveil.schedule import NoiseSchedule, uniform_nodes

__all__ = ["bootstrapped_inversion", "exact_nodes"]


def exact_nodes(schedule: NoiseSchedule, steps: int, name: str) -> tuple[int, ...]:
    """Nodes 0 … `steps`, uniform over timesteps 1 … last.

    Raises:
        OptionError: ``steps`` is out of range.
    """
    if not 2 <= steps < schedule.steps - 1:
        raise OptionError(f"{name} steps is {steps}, expected 2 to {schedule.steps - 2}")
    return uniform_nodes(steps + 1, first=1, last=schedule.steps - 1)


def bootstrapped_inversion(schedule: NoiseSchedule, table: SamplerTable) -> SamplerTable:
    """The inverse of a table over pairs, from one clean latent.

    One DDIM step from node 0 to node 1 makes the first pair. Its error does not matter to the round
    trip: `table` arrives at node 0 without it.

    Args:
        schedule: Noise schedule of the model.
        table: Exactly invertible; starts from a pair.
    """
    inverse = table.inverse()
    here, there = table.end_timestep, table.steps[-1].timestep
    bootstrap = ddim_step(schedule, here, there, label=here)
    rows = (bootstrap, *inverse.steps)
    return replace(inverse, start_timestep=here, steps=rows, prev_timestep=None)
