"""What the training scripts of this recipe share: data, networks, schedule, checkpoints."""

from __future__ import annotations

import argparse
import copy
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from diffveil.faces import Face
from diffveil_export.models.low_rank import low_rank_state
from diffveil_export.reference.autoencoder import FaceAutoencoder
from diffveil_export.reference.recognizer import FaceRecognizer

CROP = 128
CENTER = 16  # offset of the central 128×128 crop in a 160×160 face

_Network = TypeVar("_Network", bound=nn.Module)


def training_arguments(
    description: str, *, minutes: float, batch: int, rate: float
) -> argparse.ArgumentParser:
    """A parser with what every training script is told, and these defaults.

    Args:
        description: The script's docstring, of which the first line is shown.
        minutes: Budget of `Clock`.
        batch: Faces a step.
        rate: Highest learning rate.
    """
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path(".work/reference"))
    parser.add_argument("--minutes", type=float, default=minutes)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--rate", type=float, default=rate)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def load_faces(work: Path) -> np.ndarray:
    """Training faces, uint8 [N, 160, 160, 3] RGB, memory-mapped."""
    faces: np.ndarray = np.load(work / "train.npy", mmap_mode="r")
    return faces


def load_names(work: Path) -> list[str]:
    """Name of every training face, as `load_faces` has them."""
    return (work / "train.txt").read_text().splitlines()


def in_whole_photos(names: Sequence[str]) -> np.ndarray:
    """Which faces stand in a whole photo, bool [N]; others are mirrored at their borders."""
    return np.array([name.startswith("celeba") for name in names])


def chances(kind: np.ndarray, share: float) -> np.ndarray:
    """Probabilities [N] by which a share of what is drawn is of a kind, bool [N].

    Where all or none are of that kind, each is as likely as another.
    """
    count = int(kind.sum())
    if count in (0, len(kind)):
        return np.full(len(kind), 1 / len(kind))
    return np.where(kind, share / count, (1 - share) / (len(kind) - count))


def nearest_face(faces: Sequence[Face], middle: np.ndarray) -> Face:
    """Of detected faces the one whose eyes and nose are nearest to a point [2], (x, y)."""
    return min(faces, key=lambda f: float(np.hypot(*(f.landmarks[:3].mean(0) - middle))))


def load_weights(file: Path) -> dict[str, torch.Tensor]:
    """Weights that a script left; nothing is unpickled."""
    weights: dict[str, torch.Tensor] = torch.load(file, weights_only=True)
    return weights


def autoencoder_file(work: Path) -> Path:
    """Weights of the autoencoder with the sharpened decoder, or as it was where there is none."""
    sharpened = work / "decoder.pt"
    return sharpened if sharpened.exists() else work / "autoencoder.pt"


def load_autoencoder(file: Path) -> FaceAutoencoder:
    """The autoencoder, on the CPU and ready to be trained."""
    network = FaceAutoencoder()
    network.load_state_dict(load_weights(file))
    return network


def load_recognizer(work: Path) -> FaceRecognizer:
    """The recognizer, on the CPU and ready to be trained."""
    weights = load_weights(work / "recognizer.pt")
    network = FaceRecognizer(embedding=weights["head.weight"].shape[0])
    network.load_state_dict(weights)
    return network


def load_change(file: Path, share: float = 1.0) -> dict[str, torch.Tensor]:
    """A low-rank change to the UNet that a script left, at a share of its strength."""
    change: dict[str, torch.Tensor] = load_file(file)
    return {k: share * v if k.endswith(".up.weight") else v for k, v in change.items()}


def save_change(file: Path, network: nn.Module) -> None:
    """Write a network's low-rank change, as `write_change` does."""
    write_change(file, low_rank_state(network))


def write_change(file: Path, change: dict[str, torch.Tensor]) -> None:
    """Write a low-rank change so that a killed run leaves the previous one whole."""
    partial = file.with_suffix(".partial")
    save_file({k: v.contiguous() for k, v in change.items()}, partial)
    os.replace(partial, file)


def place(network: _Network, device: str) -> _Network:
    """The network itself, moved to a device with its weights channels last."""
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def to_unit(batch: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] → float32 [B, 3, H, W] in [-1, 1], channels last."""
    image = torch.from_numpy(np.ascontiguousarray(batch)).permute(0, 3, 1, 2)
    return image.float().div_(127.5).sub_(1.0)


def batches(
    faces: np.ndarray, size: int, rng: np.random.Generator, jitter: int = 0
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Endless shuffled batches: rows, and their crops [B, 3, 128, 128], randomly flipped."""
    while True:
        order = rng.permutation(len(faces))
        for start in range(0, len(order) - size + 1, size):
            rows = order[start : start + size]
            crops = np.empty((size, CROP, CROP, 3), np.uint8)
            for i, row in enumerate(rows):
                dy, dx = CENTER + rng.integers(-jitter, jitter + 1, 2)
                crop = faces[row, dy : dy + CROP, dx : dx + CROP]
                crops[i] = crop[:, ::-1] if rng.random() < 0.5 else crop
            yield rows, to_unit(crops)


class Average(Generic[_Network]):
    """Exponential moving average of a network's parameters and buffers."""

    def __init__(self, network: _Network, decay: float = 0.999) -> None:
        self.network: _Network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, network: _Network, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        mine, theirs = self.network.state_dict(), network.state_dict()
        floating = [k for k in mine if mine[k].is_floating_point()]
        torch._foreach_lerp_([mine[k] for k in floating], [theirs[k] for k in floating], 1 - decay)


class Clock:
    """Wall-clock training budget: the learning rate follows the share of it already spent.

    A recipe bounded by time gives its best on any machine; the time spent is part of the
    checkpoint, so an interrupted run resumes where it was on its schedule.
    """

    def __init__(self, minutes: float, peak: float, spent: float = 0.0, floor: float = 0.0) -> None:
        self.budget, self.peak, self.floor = 60 * minutes, peak, floor
        self.spent, self._last = spent, time.monotonic()

    def tick(self) -> float:
        """Account for the time since the last call; return the share of the budget spent."""
        now = time.monotonic()
        self.spent += now - self._last
        self._last = now
        return self.spent / self.budget

    def rate(self, share: float, step: int, warmup: int = 200) -> float:
        """Learning rate: linear warm-up in steps, then half a cosine in time."""
        cosine = 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
        return min(1.0, (step + 1) / warmup) * (self.floor + (self.peak - self.floor) * cosine)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that a killed run leaves the previous one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


class Run:
    """A resumable training run: what is trained, how far it is, and when it ends.

    Without a checkpoint, finished weights beside it (`NAME.pt` for `NAME.ckpt`) are gone on from.

    Args:
        path: Checkpoint; read if it exists. Tensors and plain values only, nothing is unpickled.
        parts: Networks and optimizers by name.
        clock: Schedule; resumes with the time already spent.
    """

    def __init__(self, path: Path, parts: dict[str, Any], clock: Clock) -> None:
        self.path, self.parts, self.clock, self.step = path, parts, clock, 0
        if path.exists():
            state = torch.load(path, weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(state[name])
            self.step, clock.spent = state["step"], state["spent"]
        elif path.with_suffix(".pt").exists():
            state = torch.load(path.with_suffix(".pt"), weights_only=True)
            parts["network"].load_state_dict(state)
            parts["average"].load_state_dict(state)

    def begin_step(self, *optimizers: torch.optim.Optimizer) -> bool:
        """Set the learning rates, times a group's "pace"; False when the budget is spent."""
        self.share = self.clock.tick()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.get("pace", 1.0) * self.clock.rate(self.share, self.step)
        return self.share < 1

    def save(self) -> None:
        """Write the checkpoint."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        save_checkpoint(self.path, {**state, "step": self.step, "spent": self.clock.spent})

    def log(self, **values: float) -> None:
        """Print a line of progress."""
        figures = " ".join(f"{name} {value:.4f}" for name, value in values.items())
        print(f"step {self.step} {self.share:.0%} {figures}", flush=True)


def mixed_precision(device: str) -> torch.autocast:
    """bfloat16 autocast where the processor computes in it; where it would emulate, float32."""
    native = device != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device, torch.bfloat16, enabled=native)


def adamw(network: nn.Module, decay: float, beta: float = 0.9) -> torch.optim.Optimizer:
    """The optimizer of every script here; its learning rate is set at each step."""
    return torch.optim.AdamW(
        network.parameters(), betas=(beta, 0.99), weight_decay=decay, fused=True
    )


def backward(loss: torch.Tensor, optimizer: torch.optim.Optimizer, network: nn.Module) -> None:
    """One clipped optimizer step down the gradient of `loss`."""
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()


def held_out(work: Path, every: int, count: int) -> torch.Tensor:
    """Some held-out faces [B, 3, 128, 128] in [-1, 1], to watch progress on."""
    paths = sorted((work / "heldout").rglob("*.png"))[::every][:count]
    inner = slice(CENTER, CENTER + CROP)
    return to_unit(np.stack([np.asarray(Image.open(p))[inner, inner] for p in paths]))


def save_sheet(path: Path, rows: list[torch.Tensor]) -> None:
    """Write rows of images [B, 3, H, W] in [-1, 1] as one picture."""
    sheet = torch.cat([torch.cat(list(row), 2) for row in rows], 1).clamp(-1, 1)
    pixels = ((sheet + 1) * 127.5).permute(1, 2, 0).to(torch.uint8).cpu().numpy()
    Image.fromarray(pixels).save(path)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean peak signal-to-noise ratio in dB of images in [-1, 1]."""
    mse = ((a.clamp(-1, 1) - b) / 2).square().flatten(1).mean(1)
    return float((-10 * mse.log10()).mean())
