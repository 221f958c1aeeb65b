"""O-BELM, exactly invertible with the smallest local error."""

from __future__ import annotations

from diffveil.samplers.exact import bootstrapped_inversion, exact_nodes
from diffveil.samplers.table import SamplerTable, Step
from diffveil.schedule import NoiseSchedule

__all__ = ["o_belm", "o_belm_inversion"]


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
    nodes = exact_nodes(schedule, steps, "o-belm")
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
    return bootstrapped_inversion(schedule, o_belm(schedule, steps))


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
