"""DDIM, its inversion, and the single step that other tables begin or end with."""

from __future__ import annotations

import math
from itertools import pairwise

from diffveil.errors import OptionError
from diffveil.samplers.nodes import Spacing, partial_timesteps
from diffveil.samplers.table import SamplerTable, Step
from diffveil.schedule import CLEAN, NoiseSchedule, ddim_timesteps

__all__ = ["ddim", "ddim_inversion", "ddim_step", "retrace"]


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
    if not 0.0 <= eta <= 1.0:
        raise OptionError(f"eta is {eta}, expected 0 to 1")
    timesteps, start = partial_timesteps(schedule, steps, strength, spacing)
    nodes = (*reversed(timesteps), CLEAN)
    rows = tuple(ddim_step(schedule, t, u, label=t, eta=eta) for t, u in pairwise(nodes))
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
    rows = tuple(ddim_step(schedule, u, t, label=t) for u, t in pairwise(nodes))
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
    rows = tuple(ddim_step(schedule, u, t, label=t) for u, t in pairwise(nodes))
    return SamplerTable("ddim", CLEAN, rows)


def ddim_step(
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
