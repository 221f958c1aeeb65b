"""The PyTorch networks rebuilt from a bundle are those that were exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffveil.bundle import Bundle
from diffveil.errors import BundleError
from diffveil_export.models.embedded import SOURCE_FILE, load_embedded
from diffveil_export.storage import round_weights
from tiny_models import tiny_components


def test_every_weight_comes_back(tiny_bundle: Bundle) -> None:
    exported = tiny_components()
    for module in exported.modules().values():
        round_weights(module, "int8")
    rebuilt = load_embedded(tiny_bundle)
    for part, module in exported.modules().items():
        state = rebuilt.modules()[part].state_dict()
        assert state.keys() == module.state_dict().keys()
        for name, tensor in module.state_dict().items():
            assert torch.equal(state[name], tensor), f"{part}.{name}"


def test_unconditional_is_the_bundles_own(tiny_bundle: Bundle) -> None:
    expected = torch.from_numpy(tiny_bundle.unconditional.copy())
    assert torch.equal(load_embedded(tiny_bundle).unconditional, expected)


def test_a_bundle_without_an_index_is_refused(tiny_bundle: Bundle, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.path, copy)
    (copy / SOURCE_FILE).unlink()
    with pytest.raises(BundleError):
        load_embedded(Bundle.load(copy))
