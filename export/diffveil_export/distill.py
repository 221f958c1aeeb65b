"""Trains a recognizer on latents to see what a bundle's recognizer sees in the decoded photos.

Everything about the teacher comes from the bundle's own programs, so it works for any bundle. The
student must be right where guidance asks it: on predicted clean latents of every noise level, and
on latents that its own gradient has already pushed about. Both are drawn here, the second kind
from the student as it is at that moment (as in DAgger, Ross et al., arXiv 1011.0686).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from diffveil.batching import in_chunks
from diffveil.engines import Programs
from diffveil.errors import OptionError
from diffveil_export.latent_recognizer import LatentRecognizer

__all__ = ["Distillation", "Progress", "encode_faces", "evaluate"]

Progress = Callable[[float, dict[str, float]], None]
"""Told the share of the time that is spent, and figures by name."""

_F32 = NDArray[np.float32]
_DRAWN = 64  # examples that the programs make at a time
_BATCH = 64
_REUSE = 4  # training steps for each batch of new examples
_POOL = 60_000
_NOISIEST = 850  # above this timestep a predicted latent shows nobody
_CHUNK = 32


def encode_faces(programs: Programs, faces: Iterator[NDArray[np.uint8]]) -> NDArray[np.float16]:
    """Latents of aligned faces, float16 [N, C, s, s].

    Args:
        programs: Of the bundle.
        faces: Batches of aligned faces, uint8 [B, S, S, 3] RGB.
    """
    rows = []
    for batch in faces:
        image = np.ascontiguousarray(batch.transpose(0, 3, 1, 2)).astype(np.float32) / 127.5 - 1
        rows.append(in_chunks(programs.encode, _CHUNK, image=image).astype(np.float16))
    if not rows:
        raise OptionError("no face was found in the photos: nothing to learn from")
    return np.concatenate(rows)


@dataclass
class _Pool:
    """Examples so far, the oldest overwritten."""

    latents: NDArray[np.float16]
    targets: NDArray[np.float16]
    filled: int = 0
    position: int = 0

    def add(self, latents: _F32, targets: _F32) -> None:
        rows = np.arange(self.position, self.position + len(latents)) % len(self.latents)
        self.latents[rows], self.targets[rows] = latents, targets
        self.filled = max(self.filled, min(self.position + len(latents), len(self.latents)))
        self.position = (self.position + len(latents)) % len(self.latents)

    def draw(self, count: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        rows = rng.integers(0, self.filled, count)
        return (
            torch.from_numpy(self.latents[rows].astype(np.float32)),
            torch.from_numpy(self.targets[rows].astype(np.float32)),
        )


class Distillation:
    """One student's training, to be gone on with after an interruption.

    Args:
        programs: encode, decode, recognize and denoise of the bundle.
        latents: Of faces, float16 [N, C, s, s].
        student: Network to train.
        checkpoint: Where the state is kept; read if it is there.
        minutes: Wall-clock time of the whole training, interruptions not counted.
        rate: Peak learning rate.
        seed: Of the examples.
    """

    def __init__(
        self,
        programs: Programs,
        latents: NDArray[np.float16],
        student: LatentRecognizer,
        *,
        checkpoint: Path | None = None,
        minutes: float = 30.0,
        rate: float = 2e-3,
        seed: int = 0,
    ) -> None:
        self._programs, self._latents, self.student = programs, latents, student
        self._checkpoint, self._budget, self._rate = checkpoint, 60.0 * minutes, rate
        self._optimizer = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=0.02)
        self._average = {k: v.detach().clone() for k, v in student.state_dict().items()}
        self.step, self.spent = 0, 0.0
        if checkpoint is not None and checkpoint.exists():
            self._resume(checkpoint)
        self._rng = np.random.default_rng((seed, self.step))
        shape, width = latents.shape[1:], student.config["embedding"]
        self._pool = _Pool(
            np.empty((_POOL, *shape), np.float16), np.empty((_POOL, width), np.float16)
        )

    def _resume(self, checkpoint: Path) -> None:
        try:
            state = torch.load(checkpoint, weights_only=True)
            self.student.load_state_dict(state["student"])
            self._optimizer.load_state_dict(state["optimizer"])
            self._average = state["average"]
            self.step, self.spent = state["step"], state["spent"]
        except Exception as error:  # whatever reading a broken file ends with
            raise OptionError(
                f"'{checkpoint}' is no checkpoint of a network of this size: remove it, or give "
                "the options that it was begun with"
            ) from error

    def run(self, progress: Progress | None = None) -> LatentRecognizer:
        """Train until the time is spent; returns the student with averaged weights."""
        last, seen = time.monotonic(), {"loss": 0.0, "count": 0.0}
        saved = last
        while self.spent < self._budget:
            self._pool.add(*self._examples())
            for _ in range(_REUSE):
                seen["loss"] += self._train()
                seen["count"] += 1
            now = time.monotonic()
            self.spent, last = self.spent + now - last, now
            if now - saved > 120:
                self.save()
                saved = now
            if progress is not None and self.step % (10 * _REUSE) == 0:
                figures = {"step": float(self.step), "cosine": 1 - seen["loss"] / seen["count"]}
                progress(min(1.0, self.spent / self._budget), figures)
                seen = {"loss": 0.0, "count": 0.0}
        self.save()
        self.student.load_state_dict(self._average)
        return self.student.eval()

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        if self._checkpoint is None:
            return
        partial = self._checkpoint.with_suffix(".partial")
        state = {
            "student": self.student.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "average": self._average,
            "step": self.step,
            "spent": self.spent,
        }
        torch.save(state, partial)
        os.replace(partial, self._checkpoint)

    def _train(self) -> float:
        latent, target = self._pool.draw(_BATCH, self._rng)
        share = min(1.0, self.spent / self._budget)
        warm = min(1.0, (self.step + 1) / 200)
        for group in self._optimizer.param_groups:
            # A plain float: checkpoints hold nothing else.
            group["lr"] = warm * self._rate * (0.5 * (1 + math.cos(math.pi * share)) + 0.01)
        self.student.train()
        loss = (1 - (self.student(latent) * target).sum(1)).mean()
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self.step += 1
        decay = min(0.998, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, value in self.student.state_dict().items():
                if value.is_floating_point():
                    self._average[name].lerp_(value, 1 - decay)
                else:
                    self._average[name].copy_(value)
        return float(loss.detach())

    def _examples(self) -> tuple[_F32, _F32]:
        """New latents [B, C, s, s] and what the recognizer sees in them, [B, E]."""
        latents = self._predicted(_DRAWN)
        pushed = self._rng.random(_DRAWN) < 0.5
        latents[pushed] = self._pushed(latents[pushed])
        return latents, self._targets(latents)

    def _predicted(self, count: int) -> _F32:
        """Clean latents as the denoiser predicts them from some timestep; a quarter are clean."""
        programs, rng = self._programs, self._rng
        schedule = programs.bundle.manifest.schedule
        clean = self._latents[rng.integers(0, len(self._latents), count)].astype(np.float32)
        t = rng.integers(0, _NOISIEST, count)
        signal = np.array([schedule.signal(int(i)) for i in t], np.float32)[:, None, None, None]
        sigma = np.array([schedule.noise(int(i)) for i in t], np.float32)[:, None, None, None]
        noisy = signal * clean + sigma * rng.standard_normal(clean.shape, dtype=np.float32)
        unconditional = programs.bundle.unconditional
        rows = np.flatnonzero(rng.random(count) < 0.75)
        epsilon = in_chunks(
            programs.denoise,
            _CHUNK,
            latent=noisy[rows],
            timestep=t[rows].astype(np.int64),
            conditioning=np.broadcast_to(unconditional, (len(rows), *unconditional.shape[1:])),
        )
        clean[rows] = (noisy[rows] - sigma[rows] * epsilon) / signal[rows]
        return clean

    def _pushed(self, latents: _F32) -> _F32:
        """Latents after a few steps along the student's own gradient, as guidance takes them."""
        if not len(latents):
            return latents
        self.student.eval()
        x = torch.from_numpy(latents)
        with torch.no_grad():
            others = self.student(x[torch.from_numpy(self._rng.permutation(len(x)))])
            own = self.student(x)
        # Away from themselves, or towards somebody else.
        away = torch.from_numpy(self._rng.random(len(x)) < 0.6)
        anchor = torch.where(away[:, None], -own, others)
        steps = int(self._rng.integers(1, 9))
        reach = self._rng.uniform(0.02, 0.6, len(x)).astype(np.float32)
        size = torch.from_numpy(reach / steps).view(-1, 1, 1, 1)
        for _ in range(steps):
            x = x.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad((self.student(x) * anchor).sum(), x)
            rms = gradient.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=1e-12)
            x = x + size * gradient / rms
        return x.detach().numpy()

    def _targets(self, latents: _F32) -> _F32:
        image = in_chunks(self._programs.decode, _CHUNK, latent=latents)
        return in_chunks(self._programs.recognize, _CHUNK, image=image)


@torch.no_grad()
def evaluate(
    programs: Programs, student: LatentRecognizer, latents: NDArray[np.float16]
) -> dict[str, float]:
    """How well a student sees what the bundle's recognizer sees in photos it has not learnt from.

    Args:
        programs: Of the bundle.
        student: In evaluation mode.
        latents: Of other faces, float16 [N, C, s, s].

    Returns:
        ``cosine``: mean cosine of both embeddings; ``gradient``: mean cosine of their energies'
        gradients, repelling from the photo's own embedding plus a tenth of noise.
    """
    x = latents.astype(np.float32)
    image = in_chunks(programs.decode, _CHUNK, latent=x)
    teacher = in_chunks(programs.recognize, _CHUNK, image=image)
    cosine = (student(torch.from_numpy(x)).numpy() * teacher).sum(1)
    rng = np.random.default_rng(0)
    anchor = teacher + 0.1 * rng.standard_normal(teacher.shape, dtype=np.float32)
    anchor /= np.linalg.norm(anchor, axis=1, keepdims=True)
    on, off = np.ones(len(x), np.float32), np.zeros(len(x), np.float32)
    alignment = []
    for start in range(0, len(x), 8):
        rows = slice(start, start + 8)
        count = len(x[rows])
        full, _, _ = programs.guide(
            x0=x[rows],
            anchor=anchor[rows],
            repel=on[rows],
            attract=off[rows],
            sibling=np.zeros((count, count), np.float32),
        )
        with torch.enable_grad():
            latent = torch.from_numpy(x[rows]).requires_grad_(True)
            energy = (student(latent) * torch.from_numpy(anchor[rows])).sum()
            (cheap,) = torch.autograd.grad(energy, latent)
        a, b = full.reshape(count, -1), cheap.numpy().reshape(count, -1)
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        alignment.extend((a * b).sum(1) / np.maximum(norms, 1e-20))
    return {"cosine": float(cosine.mean()), "gradient": float(np.mean(alignment))}
