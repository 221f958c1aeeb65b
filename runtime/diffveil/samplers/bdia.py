"""BDIA-DDIM, exactly invertible, one evaluation a step."""

from __future__ import annotations

from dataclasses import replace

from diffveil.errors import OptionError
from diffveil.samplers.ddim import ddim_step
from diffveil.samplers.exact import bootstrapped_inversion, exact_nodes
from diffveil.samplers.table import SamplerTable, Step
from diffveil.schedule import NoiseSchedule

__all__ = ["bdia", "bdia_inversion"]


def bdia(schedule: NoiseSchedule, steps: int, *, gamma: float = 1.0) -> SamplerTable:
    """BDIA-DDIM from a pair of noisy latents to the latent that they encode.

    Zhang et al., "Exact Diffusion Inversion via Bi-directional Integration Approximation",
    arXiv 2307.10829, equation 20. With Δ(t→u | x) the increment of a DDIM step from t to u,

        x_{i-1} = γ x_{i+1} + (1 − γ) x_i − γ Δ(t_i→t_{i+1} | x_i) + Δ(t_i→t_{i-1} | x_i),

    so each interval is integrated from both of its ends. Nodes and evaluations are those of
    ``o_belm``.

    Args:
        schedule: Noise schedule of the model.
        steps: Number of intervals between nodes, at least 2.
        gamma: γ in (0, 1]; at 0 it would be DDIM, not invertible. Below 1 the way from the photo to
            the pair multiplies rounding errors by 1/γ a step.

    Raises:
        OptionError: An argument is out of range.
    """
    if not 0.0 < gamma <= 1.0:
        raise OptionError(f"gamma is {gamma}, expected more than 0 and at most 1")
    nodes = exact_nodes(schedule, steps, "bdia")
    rows = tuple(
        _step(schedule, nodes[i + 1], nodes[i], nodes[i - 1], gamma)
        for i in range(steps - 1, 0, -1)
    )
    return SamplerTable("bdia", nodes[-2], rows, prev_timestep=nodes[-1])


def bdia_inversion(schedule: NoiseSchedule, steps: int, *, gamma: float = 1.0) -> SamplerTable:
    """BDIA-DDIM from one encoded latent to the pair of noisy latents that encodes it exactly.

    ``steps`` evaluations; ends with x at node ``steps`` and x_prev at node ``steps`` − 1, so swap
    the two to recover.

    Args:
        schedule: Noise schedule of the model.
        steps: Number of intervals between nodes, the same as for ``bdia``.
        gamma: The same as for ``bdia``.

    Raises:
        OptionError: An argument is out of range.
    """
    return bootstrapped_inversion(schedule, bdia(schedule, steps, gamma=gamma))


def _step(schedule: NoiseSchedule, back: int, here: int, there: int, gamma: float) -> Step:
    down = ddim_step(schedule, here, there, label=here)
    up = ddim_step(schedule, here, back, label=here)
    return replace(down, a0=down.a0 - gamma * up.a0, a1=gamma, b0=down.b0 - gamma * up.b0)
