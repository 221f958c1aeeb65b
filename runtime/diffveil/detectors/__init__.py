"""Face detectors. Any object with a `detect` method (see `diffveil.faces.FaceDetector`) will do."""

from __future__ import annotations

from diffveil.detectors.centerface import CenterFace
from diffveil.detectors.yunet import YuNet

__all__ = ["CenterFace", "YuNet"]
