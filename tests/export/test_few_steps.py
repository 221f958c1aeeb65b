"""`denoise_few`: a distilled denoiser that shares its teacher's weights in a bundle."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from diffveil.bundle import Bundle
from diffveil.engines import ONNXRuntimeCPU
from diffveil.errors import OptionError
from diffveil_export.components import Components
from diffveil_export.engines.builder import BuildOptions, build_engines
from diffveil_export.engines.trt_api import load_builder
from diffveil_export.exporter import FEW_STEPS_FILE, WEIGHTS_FILE, export_bundle
from diffveil_export.models.embedded import load_embedded
from diffveil_export.models.low_rank import (
    LowRankConv2d,
    LowRankLinear,
    add_low_rank,
    load_low_rank,
    low_rank_parameters,
)
from diffveil_export.models.stable_diffusion import load_stable_diffusion
from diffveil_export.wrappers import wrap
from parity import assert_close_to_reference
from tiny_models import few_state, tiny_few_components, tiny_networks

RANK = 2


@pytest.fixture(scope="module")
def components() -> Components:
    return tiny_few_components()


@pytest.fixture(scope="module")
def bundle(components: Components, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    target = tmp_path_factory.mktemp("few") / "bundle"
    return export_bundle(components, target).bundle


@pytest.mark.parametrize("batch", [1, 3])
def test_layers_compute_the_changed_weight(batch: int) -> None:
    generator = torch.Generator().manual_seed(batch)
    linear, conv = nn.Linear(9, 7).double(), nn.Conv2d(5, 6, 3, 2, 1).double()
    bare = nn.Linear(9, 7, bias=False).double()
    for layer, size in (
        (linear, (batch, 4, 9)),
        (linear, (batch, 9)),
        (bare, (batch, 9)),
        (conv, (batch, 5, 7, 6)),
    ):
        kind: Any = LowRankConv2d if layer is conv else LowRankLinear
        changed = kind(layer, 2).double()
        nn.init.normal_(changed.up.weight, generator=generator)
        x = torch.randn(size, generator=generator, dtype=torch.float64)
        # Beside each other rather than summed: base(x) + up(down(x)).
        if layer is not conv:
            expected = layer(x) + changed.up(changed.down(x))
        else:
            down = changed.down.weight.view(2, 5, 3, 3)
            inner = F.conv2d(x, down, None, 2, 1)
            expected = layer(x) + torch.einsum("or,brhw->bohw", changed.up.weight, inner)
        torch.testing.assert_close(changed(x), expected, rtol=1e-12, atol=1e-12)


def test_a_new_change_changes_nothing_and_trains_alone() -> None:
    _, unet, _, _ = tiny_networks(1)
    few = copy.deepcopy(unet)
    assert add_low_rank(few, RANK) > 10
    x, t, c = torch.randn(2, 8, 4, 4), torch.tensor([3, 700]), torch.randn(2, 5, 24)
    torch.testing.assert_close(few(x, t, c).sample, unet(x, t, c).sample, rtol=1e-5, atol=1e-5)
    trained = {id(p) for p in few.parameters() if p.requires_grad}
    assert trained == {id(p) for p in low_rank_parameters(few)}


def test_a_few_step_model_shares_its_teachers_parameters(components: Components) -> None:
    modules = components.modules()
    own = {id(p) for p in modules["unet"].parameters()}
    shared = {id(p) for p in modules["few"].parameters()} & own
    assert shared == own


def test_a_few_step_model_that_changes_nothing_has_no_file_of_its_own(
    components: Components, tmp_path: Path
) -> None:
    shared: dict[int, Any] = {id(p): p for p in components.modules()["unet"].parameters()}
    same = replace(components, few=copy.deepcopy(components.unet, shared))
    bundle = export_bundle(same, tmp_path / "bundle").bundle
    assert FEW_STEPS_FILE not in bundle.manifest.files
    assert not (bundle.path / FEW_STEPS_FILE).exists()
    backend, rng = ONNXRuntimeCPU(threads=1), np.random.default_rng(0)
    inputs = {
        "latent": rng.standard_normal((2, 8, 4, 4), np.float32),
        "timestep": np.array([3, 700]),
        "conditioning": rng.standard_normal((2, *bundle.unconditional.shape[1:]), np.float32),
    }
    ours, plain = (backend.load(bundle, n).run(**inputs) for n in ("denoise_few", "denoise"))
    np.testing.assert_array_equal(ours["epsilon"], plain["epsilon"])


def test_states_that_do_not_fit_are_refused() -> None:
    _, unet, _, _ = tiny_networks(1)
    state = few_state(unet, 0)
    first = sorted(state)[0]
    with pytest.raises(OptionError, match=r"do not fit the network: .*nowhere"):
        load_low_rank(copy.deepcopy(unet), state | {"nowhere.up.weight": torch.zeros(2, 2)})
    with pytest.raises(OptionError, match="do not fit"):
        load_low_rank(copy.deepcopy(unet), {k: v for k, v in state.items() if k != first})
    with pytest.raises(OptionError, match="expected one rank, received"):
        load_low_rank(copy.deepcopy(unet), {})
    with pytest.raises(OptionError, match="expected at least 1"):
        add_low_rank(copy.deepcopy(unet), 0)
    with pytest.raises(OptionError, match="no layer is large enough"):
        add_low_rank(nn.Sequential(nn.Linear(2, 2)), 1)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_program_is_the_distilled_network(
    components: Components, bundle: Bundle, batch: int
) -> None:
    generator = torch.Generator().manual_seed(40 + batch)
    latent = torch.randn(batch, 8, 4, 4, generator=generator)
    timestep = torch.randint(0, 1000, (batch,), generator=generator)
    conditioning = torch.randn(batch, *bundle.unconditional.shape[1:], generator=generator)
    backend = ONNXRuntimeCPU(threads=1)
    engines = {name: backend.load(bundle, name) for name in ("denoise", "denoise_few")}

    inputs = {
        "latent": latent.numpy(),
        "timestep": timestep.numpy(),
        "conditioning": conditioning.numpy(),
    }
    ours = engines["denoise_few"].run(**inputs)["epsilon"]
    module = wrap(components, "denoise_few")
    assert_close_to_reference(module, (latent, timestep, conditioning), [ours])
    plain = engines["denoise"].run(**inputs)["epsilon"]
    assert np.abs(plain - ours).max() > 0.01


def test_the_bundle_stores_the_shared_weights_once(bundle: Bundle) -> None:
    files = {entry.name: entry.bytes for entry in bundle.manifest.all_files()}
    assert files[FEW_STEPS_FILE] < files[WEIGHTS_FILE] / 4
    assert set(bundle.program("denoise_few").data) == {WEIGHTS_FILE, FEW_STEPS_FILE}
    assert bundle.program("denoise").data == (WEIGHTS_FILE,)


def test_keys_do_not_depend_on_it(components: Components, bundle: Bundle, tmp_path: Path) -> None:
    source = {k: v for k, v in components.source.items() if k != "few"}
    without = export_bundle(replace(components, few=None, source=source), tmp_path / "without")
    assert "denoise_few" not in without.bundle.manifest.programs
    assert without.bundle.fingerprint == bundle.fingerprint


def test_it_is_rebuilt_from_the_bundle(components: Components, bundle: Bundle) -> None:
    rebuilt = load_embedded(bundle).modules()["few"].state_dict()
    exported = components.modules()["few"].state_dict()
    assert rebuilt.keys() == exported.keys()
    for name, value in exported.items():
        assert torch.equal(rebuilt[name], value), name


def test_stable_diffusion_takes_an_adapter_for_it(folder: Path, tmp_path: Path) -> None:
    def load(few_lora: tuple[Path, float] | None = None) -> Components:
        return load_stable_diffusion(
            folder,
            msi=tmp_path / "msi.safetensors",
            recognizer=tmp_path / "ir.pth",
            few_lora=few_lora,
        )

    plain = load()
    unet = plain.modules()["unet"].get_submodule("unet")
    path = next(n for n, m in unet.named_modules() if n.endswith("attn1.to_q"))
    weight = unet.get_submodule(path).weight
    assert isinstance(weight, torch.Tensor)
    down, up = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
    names = {f"unet.{path}.lora_A.weight": down, f"unet.{path}.lora_B.weight": up}
    save_file(names, tmp_path / "few.safetensors")
    loaded = load((tmp_path / "few.safetensors", 0.5))
    assert [s.name for s in loaded.programs][-1] == "denoise_few"
    assert "few_lora" in loaded.provenance
    changed = loaded.modules()["few"].get_submodule(f"unet.{path}").weight
    torch.testing.assert_close(changed, weight + 0.5 * up @ down)
    kept = loaded.modules()["unet"].get_submodule(f"unet.{path}").weight
    torch.testing.assert_close(kept, weight)
    text = {f"text_encoder.{k[5:]}": v for k, v in names.items()}
    save_file(text, tmp_path / "text.safetensors")
    with pytest.raises(OptionError, match="text_encoder"):
        load((tmp_path / "text.safetensors", 1.0))


@pytest.mark.trt
def test_an_engine_is_built_of_it(bundle: Bundle, tmp_path: Path) -> None:
    """Its weights are sums of constants, which the builder must fold as runtimes do."""
    pytest.importorskip(
        "tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'diffveil[tensorrt-rtx]'"
    )
    copied = Bundle.load(shutil.copytree(bundle.path, tmp_path / "bundle"))
    options = BuildOptions(targets=("89",), programs=("denoise", "denoise_few"))
    plain, few = build_engines(copied, load_builder("tensorrt-rtx"), options)
    assert (plain.status, few.status) == ("built", "built")
    # Factors that were kept and multiplied at every call would make it larger by them.
    assert few.path.stat().st_size < 1.2 * plain.path.stat().st_size
