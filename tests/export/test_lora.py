"""Fused adapters against networks that compute base(x) + scale·up(down(x)) beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffveil.errors import OptionError
from diffveil_export.sources.lora import fuse_lora, parse_lora

RANK = 3


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(6, 5)
        self.to_out = nn.ModuleList([nn.Linear(5, 6)])


class _Net(nn.Module):
    """One layer of each kind, with names like a UNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList([_Block()])
        self.proj_in = nn.Conv2d(4, 7, 1)
        self.conv = nn.Conv2d(4, 7, 3, stride=2, padding=1)


class _Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text_model = nn.ModuleDict({"q_proj": nn.Linear(6, 5)})


def _adapter(layer: nn.Module, generator: torch.Generator) -> tuple[nn.Module, nn.Module]:
    down: nn.Module
    up: nn.Module
    if isinstance(layer, nn.Conv2d):
        down = nn.Conv2d(
            layer.in_channels,
            RANK,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            bias=False,
        )
        up = nn.Conv2d(RANK, layer.out_channels, 1, bias=False)
    else:
        assert isinstance(layer, nn.Linear)
        down = nn.Linear(layer.in_features, RANK, bias=False)
        up = nn.Linear(RANK, layer.out_features, bias=False)
    for part in (down, up):
        assert isinstance(part.weight, torch.Tensor)
        nn.init.normal_(part.weight, generator=generator)
    return down, up


LAYERS = {
    "down_blocks.0.to_q": (2, 4, 6),
    "down_blocks.0.to_out.0": (2, 5),
    "proj_in": (2, 4, 5, 5),
    "conv": (2, 4, 7, 7),
}


def _names(style: str, path: str) -> tuple[str, str]:
    flat = path.replace(".", "_")
    if style == "processor":
        stem, _, end = path.removesuffix(".0").rpartition(".")
        base = f"unet.{stem}.processor.{end}_lora"
        return f"{base}.down.weight", f"{base}.up.weight"
    return {
        "peft": (f"unet.{path}.lora_A.weight", f"unet.{path}.lora_B.weight"),
        "diffusers": (f"unet.{path}.lora.down.weight", f"unet.{path}.lora.up.weight"),
        "kohya": (f"lora_unet_{flat}.lora_down.weight", f"lora_unet_{flat}.lora_up.weight"),
    }[style]


@torch.no_grad()
@pytest.mark.parametrize("style", ["peft", "diffusers", "kohya", "processor"])
@pytest.mark.parametrize("alpha", [None, 1.5])
def test_fused_weights_compute_what_the_pair_computes(
    style: str, alpha: float | None, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(2)
    unet, text, scale = _Net(), _Text(), 0.7
    layers = {
        p: s for p, s in LAYERS.items() if style != "processor" or p.startswith("down_blocks")
    }
    state: dict[str, torch.Tensor] = {}
    expected: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for path, shape in layers.items():
        layer = unet.get_submodule(path)
        down, up = _adapter(layer, generator)
        names = _names(style, path)
        for name, part in zip(names, (down, up), strict=True):
            assert isinstance(part.weight, torch.Tensor)
            state[name] = part.weight.clone()
        if alpha is not None:
            state[names[0].replace("lora_down.weight", "alpha")] = (
                torch.tensor(alpha) if style == "kohya" else state[names[0]]
            )
        x = torch.randn(shape, generator=generator)
        factor = scale * (alpha / RANK if alpha is not None and style == "kohya" else 1)
        expected[path] = (x, layer(x) + factor * up(down(x)))
    save_file(state, tmp_path / "lora.safetensors")
    stated = fuse_lora(unet, text, tmp_path / "lora.safetensors", scale)
    assert "lora.safetensors sha256 " in stated["lora"]
    assert f"scale 0.7, {len(layers)} layers" in stated["lora"]
    for path, (x, y) in expected.items():
        torch.testing.assert_close(unet.get_submodule(path)(x), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "prefix",
    ["text_encoder.text_model.q_proj", "text_encoder.q_proj", "lora_te_text_model_q_proj"],
)
def test_text_encoders_are_adapted_too(prefix: str, tmp_path: Path) -> None:
    text = _Text()
    layer: Any = text.text_model["q_proj"]
    before = layer.weight.detach().clone()
    down, up = torch.randn(RANK, 6), torch.randn(5, RANK)
    save_file(
        {f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up},
        tmp_path / "a.safetensors",
    )
    fuse_lora(_Net(), text, tmp_path / "a.safetensors")
    torch.testing.assert_close(layer.weight.detach(), before + up @ down)


def test_all_misfits_are_named_and_nothing_changes(tmp_path: Path) -> None:
    unet = _Net()
    before = {n: t.clone() for n, t in unet.state_dict().items()}
    state = {
        "unet.proj_in.lora_A.weight": torch.zeros(RANK, 4, 1, 1),
        "unet.proj_in.lora_B.weight": torch.zeros(7, RANK, 1, 1),
        "unet.conv.lora_A.weight": torch.zeros(RANK, 4, 5, 5),
        "unet.conv.lora_B.weight": torch.zeros(7, RANK, 1, 1),
        "unet.down_blocks.0.to_q.lora_A.weight": torch.zeros(RANK, 6),
        "unet.nowhere.lora_A.weight": torch.zeros(RANK, 6),
        "unet.proj_in.dora_scale": torch.zeros(7),
    }
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(OptionError) as caught:
        fuse_lora(unet, _Text(), tmp_path / "a.safetensors")
    message = str(caught.value)
    assert "unet.conv.lora_A.weight, unet.conv.lora_B.weight do not fit weight [7, 4, 3, 3]" in (
        message
    )
    assert "unet.down_blocks.0.to_q.lora_A.weight do not fit" in message
    assert "unet.nowhere.lora_A.weight fits no layer" in message
    assert "unet.proj_in.dora_scale fits no layer" in message
    for name, tensor in unet.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["a.pt", "none.safetensors"])
def test_files_that_are_no_adapters(name: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--lora"):
        fuse_lora(_Net(), _Text(), tmp_path / name)


def test_scales() -> None:
    assert parse_lora("a/b.safetensors") == (Path("a/b.safetensors"), 1.0)
    assert parse_lora("b.safetensors:0.125") == (Path("b.safetensors"), 0.125)
    assert parse_lora("C:/b.safetensors") == (Path("C:/b.safetensors"), 1.0)
    for text in ("b.safetensors:1.2.3", "b.safetensors:1e999"):
        with pytest.raises(OptionError, match="FILE:SCALE"):
            parse_lora(text)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ('{"unet.r": 3, "unet.lora_alpha": 6}', "states alpha 6 at rank 3"),
        ('{"unet.use_dora": true}', "asks for use_dora"),
        ('{"unet.alpha_pattern": {"a": 1}}', "has an alpha_pattern"),
        ("[", "cannot be read"),
    ],
)
def test_strengths_in_the_header_are_not_guessed_at(
    stated: str, message: str, tmp_path: Path
) -> None:
    down, up = torch.zeros(RANK, 4, 1, 1), torch.zeros(7, RANK, 1, 1)
    state = {"unet.proj_in.lora_A.weight": down, "unet.proj_in.lora_B.weight": up}
    file = tmp_path / "a.safetensors"
    save_file(state, file, {"lora_adapter_metadata": stated})
    with pytest.raises(OptionError, match=message):
        fuse_lora(_Net(), _Text(), file)
    save_file(state, file, {"lora_adapter_metadata": '{"unet.r": 3, "unet.lora_alpha": 3}'})
    fuse_lora(_Net(), _Text(), file)


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    down, up = torch.full((RANK, 4, 1, 1), torch.inf), torch.ones(7, RANK, 1, 1)
    state = {"unet.proj_in.lora_A.weight": down, "unet.proj_in.lora_B.weight": up}
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(OptionError, match="not finite"):
        fuse_lora(_Net(), _Text(), tmp_path / "a.safetensors")
