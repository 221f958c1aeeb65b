"""Runs in optimum-onnx's own environment (benchmarks.peers): img2img in ONNX Runtime.

Reads questions from stdin, a line each: first `{"model": FOLDER, "threads": N}`, a diffusers
folder that is exported and opened; then `{"steps": N, "strength": X, "side": S}`, one picture of
random pixels through the pipeline without classifier-free guidance. Answers `{"versions"}`, and
`{"seconds", "evaluations"}`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib import metadata
from typing import Any

import numpy as np
import onnxruntime
from optimum.onnxruntime import ORTStableDiffusionImg2ImgPipeline
from PIL import Image


class Pipeline:
    """The exported pipeline."""

    def __init__(self, folder: str, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.pipeline: Any = ORTStableDiffusionImg2ImgPipeline.from_pretrained(
            folder, export=True, session_options=options, safety_checker=None
        )
        self.pipeline.set_progress_bar_config(disable=True)

    def seconds(self, steps: int, strength: float, side: int) -> dict[str, Any]:
        """One call."""
        pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
        evaluations = 0

        def count(*arguments: Any) -> Any:
            nonlocal evaluations
            evaluations += 1
            return arguments[-1]

        started = time.perf_counter()
        self.pipeline(
            prompt="a",
            image=Image.fromarray(pixels),
            strength=strength,
            num_inference_steps=steps,
            guidance_scale=1.0,
            output_type="np",
            callback_on_step_end=count,
        )
        return {"seconds": time.perf_counter() - started, "evaluations": evaluations}


def main() -> None:
    """Answer until stdin ends. What libraries print goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    pipeline: Pipeline | None = None
    for line in sys.stdin:
        question = json.loads(line)
        reply: dict[str, Any]
        try:
            if "model" in question:
                pipeline = Pipeline(question["model"], question["threads"])
                names = ("optimum-onnx", "optimum", "transformers", "diffusers", "onnxruntime")
                reply = {"versions": {name: metadata.version(name) for name in names}}
            else:
                assert pipeline is not None
                reply = pipeline.seconds(**question)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(reply) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
