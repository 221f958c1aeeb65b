"""The tiny models are a function of their seed, whatever ran before."""

from __future__ import annotations

import torch

from tiny_models import tiny_components


def test_same_seed_same_weights() -> None:
    first = tiny_components(seed=4)
    torch.rand(3)  # moves the global generator
    second = tiny_components(seed=4)
    other = tiny_components(seed=5)
    for name, module in first.modules().items():
        state, changed = second.modules()[name].state_dict(), other.modules()[name].state_dict()
        for key, tensor in module.state_dict().items():
            assert torch.equal(tensor, state[key]), f"{name}.{key}"
        assert any(not torch.equal(tensor, changed[k]) for k, tensor in module.state_dict().items())
