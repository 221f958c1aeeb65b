"""`linear_step`, interpreted, against the runtime's loop and its own references."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from diffveil.samplers import SamplerTable, Step
from diffveil.sampling import run
from diffveil_kernels.calls import StepBuffers
from diffveil_kernels.errors import KernelInputError
from diffveil_kernels.jit import ops
from diffveil_kernels.reference.linear_step import linear_step as reference

F32 = NDArray[np.float32]
NAMES = tuple(StepBuffers.__dataclass_fields__)


def random_inputs(rows: int, channels: int, side: tuple[int, int], seed: int) -> dict[str, F32]:
    rng = np.random.default_rng(seed)
    shape = (rows, channels, *side)
    inputs = {name: rng.normal(size=shape).astype(np.float32) for name in NAMES[:7]}
    inputs["mask"] = rng.random((rows, 1, *side), dtype=np.float32)
    inputs["coefficients"] = rng.normal(size=(rows, 8))
    for flag in ("pushed", "normalise", "blend"):
        inputs[flag] = rng.integers(0, 2, rows).astype(np.float32)
    return inputs


def on_device(inputs: dict[str, F32]) -> F32:
    tensors = {name: torch.from_numpy(value.copy()) for name, value in inputs.items()}
    result: F32 = ops.linear_step(**tensors).numpy()
    return result


@given(
    rows=st.integers(1, 3),
    channels=st.integers(1, 4),
    side=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    seed=st.integers(0, 2**32 - 1),
    zeros=st.integers(0, 63),
)
@settings(max_examples=8, deadline=None)  # interpreting is slow
def test_it_is_what_the_references_compute(
    rows: int, channels: int, side: tuple[int, int], seed: int, zeros: int
) -> None:
    inputs = random_inputs(rows, channels, side, seed)
    inputs["coefficients"][0, :6] *= [zeros >> k & 1 for k in range(6)]
    actual = on_device(inputs)
    # Apart from the order in which squares are added up, the operations are the same: a bit of a
    # normalised gradient may differ, and through it one of the sum.
    largest = np.abs(inputs["coefficients"]).max() * np.abs(inputs["gradient"]).max()
    allowed = 4 * np.finfo(np.float32).eps * max(1.0, largest, float(np.abs(actual).max()))
    np.testing.assert_allclose(actual, reference(**inputs), rtol=0, atol=allowed)
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    np.testing.assert_allclose(actual, reference(**tensors).numpy(), rtol=0, atol=allowed)


def loop_step(inputs: dict[str, F32], step: Step) -> F32:
    """The runtime's own loop over one row of a table, started in the middle of it."""
    first = replace(step, b1=0.0, g=0.0, n=0.0, a0=1.0, a1=0.0, b0=0.0)
    # The loop keeps ε of the step before: a first step that changes nothing provides it.
    predictions = iter([inputs["previous_epsilon"], inputs["epsilon"]])
    table = SamplerTable("test", 1, (first, step))
    latent, _ = run(
        table,
        inputs["latent"],
        lambda x, timestep: next(predictions),
        gradient=lambda x0, step: inputs["gradient"],
        noise=lambda index: inputs["noise"],
        blend=lambda x, s: (
            x if s is first else inputs["background"] + inputs["mask"] * (x - inputs["background"])
        ),
    )
    return latent


def test_without_normalisation_it_is_the_runtimes_loop_bit_for_bit() -> None:
    inputs = random_inputs(2, 4, (9, 7), 5)
    inputs["previous"] = inputs["latent"]  # as the loop's step before left it
    numbers = (0.9, 0.2, -0.7, 0.3, 0.11, 1.7, 1.0, -1.0)
    inputs["coefficients"][:] = numbers
    inputs["pushed"][:] = inputs["blend"][:] = 1.0
    inputs["normalise"][:] = 0.0
    expected = loop_step(inputs, Step(3, 2, *numbers))
    assert on_device(inputs).tobytes() == expected.tobytes()


def test_a_step_and_its_inverse_differ_by_roundings_only() -> None:
    inputs = random_inputs(2, 4, (8, 8), 6)
    step = Step(3, 2, 0.8, 0.6, -0.9, 0.0, 0.0, 0.0, 1.0, 0.0)
    for flag in ("pushed", "normalise", "blend"):
        inputs[flag][:] = 0.0
    inputs["coefficients"][:] = step.coefficients
    following = on_device(inputs)
    back = inputs | {"previous": following}
    back["coefficients"] = np.tile(np.array(step.inverse(1).coefficients), (2, 1))
    # One rounding of the next latent, divided by a1, and one of the result.
    allowed = np.spacing(np.abs(following)) / step.a1 + np.spacing(np.abs(inputs["previous"]))
    assert (np.abs(on_device(back) - inputs["previous"]) <= allowed).all()


def test_what_has_no_coefficient_does_not_count_whatever_it_holds() -> None:
    inputs = random_inputs(3, 2, (5, 5), 7)
    inputs["coefficients"][1] = [0.5, 0, 0, 0, 0, 0, 0, 0]
    for flag in ("pushed", "normalise", "blend"):
        inputs[flag][:] = 1.0
    inputs["blend"][1] = 0.0
    plain = on_device(inputs)
    for name in ("previous", "epsilon", "previous_epsilon", "noise", "gradient", "background"):
        inputs[name][1] = np.nan
    inputs["mask"][1] = np.inf
    np.testing.assert_array_equal(on_device(inputs), plain)
    np.testing.assert_array_equal(plain[1], np.float32(0.5) * inputs["latent"][1])
    inputs["coefficients"][0, 3], inputs["previous_epsilon"][0, 0, 0, 0] = 1.0, np.nan
    assert np.isnan(on_device(inputs)[0]).sum() == 1  # where it counts it is not hidden


@pytest.mark.parametrize("size", [0.0, 1e-14, 1e-6, 1e6])
def test_gradients_become_of_unit_size_unless_they_vanish(size: float) -> None:
    inputs = random_inputs(2, 4, (6, 6), 8)
    inputs["gradient"] *= np.float32(size)
    inputs["coefficients"][:] = [0, 0, 0, 0, 0, 1, 0, 0]
    inputs["normalise"][:] = 1.0
    inputs["pushed"][:] = [1.0, 0.0]
    inputs["blend"][:] = 0.0
    step = on_device(inputs)
    rms = np.sqrt(np.mean(np.square(step.astype(np.float64)), axis=(1, 2, 3)))
    np.testing.assert_allclose(rms, [float(size > 1e-12), 0.0], atol=1e-6)


def test_misfits_are_refused() -> None:
    inputs = {n: torch.from_numpy(v) for n, v in random_inputs(2, 3, (4, 4), 9).items()}
    for name, wrong in {
        "epsilon": inputs["epsilon"].double(),
        "mask": inputs["epsilon"],
        "coefficients": inputs["coefficients"].float(),
        "pushed": inputs["pushed"][:1],
        "noise": inputs["noise"].transpose(2, 3),
    }.items():
        with pytest.raises(KernelInputError, match=f"{name}: received"):
            ops.linear_step(**(inputs | {name: wrong}))
