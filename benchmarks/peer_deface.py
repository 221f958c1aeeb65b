"""Runs in deface's own environment (benchmarks.peers): blurs and mosaics photos as it does.

Reads questions `{"photo": PATH, "way": "blur" | "mosaic"}` from stdin, a line each, and answers
`{"seconds", "after_detection", "faces", "version"}`. Detector, mask and sizes are deface's own
defaults.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import deface.deface as tool
import imageio.v2 as imageio
from deface.centerface import CenterFace


def answer(detector: CenterFace, question: dict[str, Any]) -> dict[str, Any]:
    """Detect and cover the faces of one photo, decoded beforehand."""
    frame = imageio.imread(question["photo"])[..., :3].copy()
    started = time.perf_counter()
    faces, _ = detector(frame, threshold=0.2)
    found = time.perf_counter()
    tool.anonymize_frame(
        faces,
        frame,
        mask_scale=1.3,
        replacewith=question["way"],
        ellipse=True,
        draw_scores=False,
        replaceimg=None,
        mosaicsize=20,
    )
    ended = time.perf_counter()
    return {
        "seconds": ended - started,
        "after_detection": ended - found,
        "faces": len(faces),
        "version": tool.__version__,
    }


def main() -> None:
    """Answer until stdin ends. What libraries print goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    detector = CenterFace()
    for line in sys.stdin:
        try:
            reply = answer(detector, json.loads(line))
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(reply) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
