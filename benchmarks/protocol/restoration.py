"""A small network that learns to undo a protection from pairs, in plain PyTorch.

A U-Net (Ronneberger et al. 2015) on 4×4 blocks of pixels (pixel unshuffle, Shi et al. 2016), which
predicts what to add to the protected face; mean absolute error. Networks for several protections
train in turns on the same faces, mirrored alike, so that all have had the same number of steps
whenever time is up.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Budget", "Restorer", "restore", "train"]

Pixels = NDArray[np.uint8]

_FOLD = 4
_SAVE_SECONDS = 30.0
_NATIVE = torch.cpu._is_avx512_bf16_supported()


class _Block(nn.Module):
    """Two convolutions beside a shortcut; [B, C, h, w] keeps its shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.body(x)
        return result


class Restorer(nn.Module):
    """Protected faces to restored ones, float32 RGB [B, 3, S, S] in [-1, 1]; S a multiple of 16.

    Args:
        width: Channels at the finest of three scales, a multiple of 8.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        folded = 3 * _FOLD * _FOLD
        self.enter = nn.Conv2d(folded, width, 3, padding=1)
        self.fine = _Block(width)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle = _Block(2 * width)
        self.lower = nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1)
        self.coarse = nn.Sequential(_Block(2 * width), _Block(2 * width))
        self.rise = nn.Conv2d(4 * width, width, 3, padding=1)
        self.after = _Block(width)
        self.leave = nn.Conv2d(2 * width, folded, 3, padding=1)
        nn.init.zeros_(self.leave.weight)  # starts as the identity
        nn.init.zeros_(self.leave.bias)  # type: ignore[arg-type]  # made with a bias

    def forward(self, protected: Tensor) -> Tensor:
        fine = self.fine(self.enter(F.pixel_unshuffle(protected, _FOLD)))
        middle = self.middle(self.down(fine))
        coarse = F.interpolate(self.coarse(self.lower(middle)), scale_factor=2.0)
        rising = F.interpolate(self.rise(torch.cat([coarse, middle], 1)), scale_factor=2.0)
        change = self.leave(torch.cat([self.after(rising), fine], 1))
        return protected + F.pixel_shuffle(change, _FOLD)


@dataclass(frozen=True)
class Budget:
    """How long to train: until the first of both is used up.

    Attributes:
        minutes: Wall-clock time of all networks together, earlier runs included.
        steps: Of each network.
        batch: Faces a step.
        rate: AdamW's learning rate at first; it falls to zero as a half cosine.
    """

    minutes: float
    steps: int = 100_000
    batch: int = 16
    rate: float = 1e-3

    def used(self, seconds: float, steps: int) -> float:
        """The used share, at most 1."""
        return min(1.0, max(seconds / (60 * self.minutes), steps / self.steps))


def train(
    original: Pixels,
    protected: Mapping[str, Pixels],
    budget: Budget,
    checkpoint: Path,
    *,
    made_with: Mapping[str, Any],
    width: int = 64,
    seed: int = 0,
    note: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, Restorer], dict[str, Any]]:
    """Train a network for every protection, or go on with a checkpoint's.

    Args:
        original: Faces, uint8 [N, S, S, 3].
        protected: The same faces under each protection.
        budget: When to stop.
        checkpoint: File that is written every half minute and read if it is there.
        made_with: What the pairs were made with, as plain JSON.
        width: Of the networks.
        seed: Of first weights and of the order of faces.
        note: Told how far it is.

    Returns:
        The networks, and `steps`, `seconds` and the last losses of each.

    Raises:
        ValueError: The checkpoint is of other pairs or networks; or there are no pairs.
    """
    if not len(original):
        raise ValueError("no pairs to learn from: no training photo shows a face")
    made = {"names": sorted(protected), "width": width, "seed": seed, **made_with}
    nets: dict[str, Restorer] = {}
    for name in protected:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # noqa: TID251 - nn's initialisers know no other generator
            nets[name] = Restorer(width)
    optimizers = {n: torch.optim.AdamW(net.parameters(), lr=budget.rate) for n, net in nets.items()}
    record: dict[str, Any] = {"steps": 0, "seconds": 0.0, "losses": dict.fromkeys(nets, 0.0)}
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["made"] != made:
            raise ValueError(
                f"{checkpoint}: of other pairs or networks; remove it or name another folder"
            )
        record = saved["record"]
        for name, net in nets.items():
            net.load_state_dict(saved["nets"][name])
            optimizers[name].load_state_dict(saved["optimizers"][name])

    def save() -> None:
        state = {
            "made": made,
            "record": record,
            "nets": {n: net.state_dict() for n, net in nets.items()},
            "optimizers": {n: o.state_dict() for n, o in optimizers.items()},
        }
        temporary = checkpoint.with_suffix(".part")
        torch.save(state, temporary)
        temporary.replace(checkpoint)

    before, started, saved_at = record["seconds"], time.monotonic(), time.monotonic()
    while (used := budget.used(record["seconds"], record["steps"])) < 1:
        # A function of the step: a resumed run draws what an unbroken one would have.
        rng = np.random.default_rng([seed, record["steps"]])
        rows, mirrored = rng.integers(0, len(original), budget.batch), bool(rng.integers(2))
        target = _batch(original[rows], mirrored)
        for name, net in nets.items():
            for group in optimizers[name].param_groups:
                group["lr"] = budget.rate * 0.5 * (1 + math.cos(math.pi * used))
            # Where the processor would emulate bfloat16, float32 is quicker.
            with torch.autocast("cpu", torch.bfloat16, enabled=_NATIVE):
                guess = net(_batch(protected[name][rows], mirrored))
            loss = (guess.float() - target).abs().mean()
            optimizers[name].zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizers[name].step()
            record["losses"][name] += 0.02 * (float(loss.detach()) - record["losses"][name])
        record["steps"] += 1
        record["seconds"] = before + time.monotonic() - started
        if time.monotonic() - saved_at > _SAVE_SECONDS:
            saved_at = time.monotonic()
            save()
            note(f"{record['steps']} steps, {record['seconds'] / 60:.1f} min, {record['losses']}")
    save()
    return nets, record


def restore(net: Restorer, protected: Pixels, batch: int = 32) -> Pixels:
    """Restored faces, uint8 [N, S, S, 3] as they came."""
    net.eval()
    parts = []
    with torch.no_grad():
        for start in range(0, len(protected), batch):
            out = net(_batch(protected[start : start + batch], mirrored=False))
            levels = ((out.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
            parts.append(levels.permute(0, 2, 3, 1).numpy())
    return np.concatenate(parts)


def _batch(faces: Pixels, mirrored: bool) -> Tensor:
    """uint8 [B, S, S, 3] to float32 [B, 3, S, S] in [-1, 1]."""
    tensor = torch.from_numpy(np.ascontiguousarray(faces)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return tensor.flip(3) if mirrored else tensor
