"""Bundles that a judge joins, for tests: a small one, and which files it changed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from diffveil.bundle import Bundle
from diffveil_export.reference.judge import FaceJudge

__all__ = ["digests", "judge_for"]


def judge_for(bundle: Bundle, seed: int = 0) -> FaceJudge:
    """A small one with random weights, batch statistics included."""
    torch.manual_seed(seed)
    size = bundle.image_size
    judge = FaceJudge(margin=0, size=size, widths=(8, 12), blocks=(1, 1), width=8)
    for name, buffer in judge.named_buffers():
        if buffer.is_floating_point():
            values = torch.rand_like(buffer) if "var" in name else torch.randn_like(buffer)
            buffer.copy_(values + 0.5)
    return judge


def digests(folder: Path) -> dict[str, str]:
    """SHA-256, hex, of every file in a folder, by name."""
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}
