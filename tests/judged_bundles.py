"""Bundles that a judge joins, for tests: a small one, and which files it changed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from diffveil.bundle import Bundle
from diffveil_export.reference.judge import FaceJudge
from diffveil_export.reference.recognizer import FaceRecognizer

__all__ = ["digests", "judge_for"]


def judge_for(bundle: Bundle, seed: int = 0, recognizer: FaceRecognizer | None = None) -> FaceJudge:
    """A small one with random weights, batch statistics included, fused; or of a recognizer."""
    torch.manual_seed(seed)
    if recognizer is None:
        recognizer = FaceRecognizer(0, bundle.image_size, (8, 12, 16), (1, 1, 1), 5).eval()
        for name, buffer in recognizer.named_buffers():
            if buffer.is_floating_point():
                values = torch.rand_like(buffer) if "var" in name else torch.randn_like(buffer)
                buffer.copy_(values + 0.5)
        recognizer.fuse()
    judge = FaceJudge(recognizer)
    judge.heads.measure(judge.features(torch.rand(8, 3, bundle.image_size, bundle.image_size)))
    return judge.fuse()


def digests(folder: Path) -> dict[str, str]:
    """SHA-256, hex, of every file in a folder, by name."""
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}
