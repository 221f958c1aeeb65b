"""A bundle whose programs are a few lines of NumPy: fast, exact to reason about, and recorded.

Every program keeps to its declaration (`check_inputs` sees to that) and treats rows independently.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from diffveil._manifest import FileEntry, Manifest, ProgramEntry, TensorEntry
from diffveil.align import template_for
from diffveil.bundle import CONSTANTS_FILE, SURROGATES_FILE, Bundle
from diffveil.engines import Availability, Engine, Programs
from diffveil.programs import ALL_PROGRAMS, PROGRAMS, Dimensions, ProgramSpec, check_inputs
from diffveil.schedule import NoiseSchedule

__all__ = ["DIMENSIONS", "FakeBackend", "fake_bundle", "fake_programs", "surrogate_tensors"]

Array = NDArray[Any]
F32 = NDArray[np.float32]

DIMENSIONS = Dimensions(
    image_size=32,
    latent_channels=8,
    latent_size=4,
    token_width=6,
    conditioning_length=3,
    conditioning_width=5,
    embedding_width=7,
)
_CELL = DIMENSIONS.image_size // DIMENSIONS.latent_size


def surrogate_tensors(count: int = 9, seed: int = 4) -> dict[str, Array]:
    """What a fake bundle's file of surrogates may hold."""
    rng = np.random.default_rng(seed)
    d, rank = DIMENSIONS, 5
    identities = rng.standard_normal((count, d.embedding_width))
    directions = np.linalg.qr(rng.standard_normal((10 * d.token_width, rank)))[0].T
    tensors = {
        "mean": rng.standard_normal((10, d.token_width)),
        "basis": directions.reshape(rank, 10, d.token_width),
        "coefficients": rng.standard_normal((count, rank)),
        "identities": identities / np.linalg.norm(identities, axis=1, keepdims=True),
    }
    return {name: array.astype(np.float16, order="C") for name, array in tensors.items()}


def fake_bundle(
    folder: Path,
    *,
    name: str = "fake",
    optional: Iterable[str] = (),
    surrogates: Mapping[str, Array] | None = None,
) -> Bundle:
    """A bundle without program files; bundles of different names have different fingerprints."""
    constant = np.full((1, 3, 5), 0.25, dtype=np.float32)
    raw = save({"unconditional": constant})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONSTANTS_FILE).write_bytes(raw)
    programs = {
        spec.name: ProgramEntry(
            FileEntry(
                f"{spec.name}.onnx", hashlib.sha256(f"{name}{spec.name}".encode()).hexdigest(), 1
            ),
            (),
            tuple(TensorEntry(t.name, t.dtype, t.shape(DIMENSIONS)) for t in spec.inputs),
            tuple(TensorEntry(t.name, t.dtype, t.shape(DIMENSIONS)) for t in spec.outputs),
            (),
            parts=("denoise", "guide") if spec.name == "step" else (),
        )
        for spec in (*PROGRAMS.values(), *(ALL_PROGRAMS[o] for o in optional))
    }
    files = {CONSTANTS_FILE: FileEntry(CONSTANTS_FILE, hashlib.sha256(raw).hexdigest(), len(raw))}
    if surrogates is not None:
        raw = save(dict(surrogates))
        (folder / SURROGATES_FILE).write_bytes(raw)
        entry = FileEntry(SURROGATES_FILE, hashlib.sha256(raw).hexdigest(), len(raw))
        files[SURROGATES_FILE] = entry
    template = tuple((float(x), float(y)) for x, y in template_for(DIMENSIONS.image_size))
    manifest = Manifest(
        name=name,
        dimensions=DIMENSIONS,
        schedule=NoiseSchedule(),
        prediction="epsilon",
        template=template,
        thresholds={},
        licence="none",
        provenance={},
        programs=programs,
        files=files,
    )
    return Bundle(folder, manifest)


def fake_programs(
    folder: Path,
    *,
    name: str = "fake",
    optional: Iterable[str] = (),
    surrogates: Mapping[str, Array] | None = None,
) -> Programs:
    """The programs of a fake bundle; `.backend.calls` lists every call's name and inputs."""
    bundle = fake_bundle(folder, name=name, optional=optional, surrogates=surrogates)
    return Programs(bundle, FakeBackend())


class FakeBackend:
    """Runs the fakes and keeps what they were given.

    Attributes:
        calls: Program name and copies of the inputs, in order.
        overrides: Programs to run instead, by name.
    """

    name = "fake"

    def __init__(self) -> None:
        rng = np.random.default_rng(12)
        self.colours = rng.standard_normal((8, 3)) / 2
        self.tokens = rng.standard_normal((10, 6, 3))
        # Only what decoding keeps of a latent identifies.
        kept = self.colours @ np.linalg.pinv(self.colours)
        self.identity = np.einsum("ekc,kj->ejc", rng.standard_normal((7, 8, 16)), kept)
        self.identity = self.identity.reshape(7, 8 * 16)
        self.calls: list[tuple[str, dict[str, Array]]] = []
        self.overrides: dict[str, Callable[..., dict[str, Array]]] = {}

    def available(self) -> Availability:
        return Availability(True, "it is a fake")

    def load(self, bundle: Bundle, program: str) -> Engine:
        return _FakeEngine(self, ALL_PROGRAMS[program])

    def inputs(self, program: str) -> list[dict[str, Array]]:
        """The inputs of all calls of one program."""
        return [inputs for name, inputs in self.calls if name == program]

    def compute(self, program: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        function = self.overrides.get(program) or getattr(self, program)
        outputs: dict[str, Array] = {
            name: np.asarray(value, np.float32) for name, value in function(**inputs).items()
        }
        assert set(outputs) == {t.name for t in ALL_PROGRAMS[program].outputs}
        return outputs

    def encode(self, image: F32) -> dict[str, Array]:
        """The mean colour of every cell, mixed into eight channels."""
        means = image.reshape(-1, 3, 4, _CELL, 4, _CELL).mean(axis=(3, 5))
        return {"latent": np.einsum("kc,bchw->bkhw", self.colours, means)}

    def decode(self, latent: F32) -> dict[str, Array]:
        means = np.einsum("ck,bkhw->bchw", np.linalg.pinv(self.colours), latent)
        return {"image": means.repeat(_CELL, axis=2).repeat(_CELL, axis=3)}

    def embed(self, image: F32) -> dict[str, Array]:
        return {"tokens": np.einsum("kdc,bc->bkd", self.tokens, image.mean(axis=(2, 3)))}

    def expand(self, tokens: F32) -> dict[str, Array]:
        return {"conditioning": np.tanh(tokens[:, None, :5] + 0.1 * np.arange(3)[:, None])}

    def denoise(self, latent: F32, timestep: Array, conditioning: F32) -> dict[str, Array]:
        condition = conditioning.mean(axis=(1, 2)) + timestep / 1000.0
        return {"epsilon": np.tanh(latent + condition[:, None, None, None])}

    def denoise_few(self, **inputs: Array) -> dict[str, Array]:
        """Another model: it predicts half as much."""
        return {"epsilon": 0.5 * self.denoise(**inputs)["epsilon"]}

    def recognize(self, image: F32) -> dict[str, Array]:
        return {"embedding": self._identify(self.encode(image)["latent"])[0]}

    def guide(
        self, x0: F32, anchor: F32, repel: F32, attract: F32, sibling: F32
    ) -> dict[str, Array]:
        """Energy and gradient, differentiated by hand."""
        e, length = self._identify(x0)
        cosine = (e * anchor).sum(axis=1)
        pairs = np.triu(sibling, 1) * (e @ e.T > 0)
        energy = repel * np.maximum(cosine, 0) + attract * (1 - cosine)
        energy = energy + (pairs * (e @ e.T)).sum(axis=1)
        slope = (repel * (cosine > 0) - attract)[:, None] * anchor + (pairs + pairs.T) @ e
        # Through the normalisation: the part along e does not count.
        slope = (slope - (slope * e).sum(axis=1, keepdims=True) * e) / length
        gradient = (slope @ self.identity).reshape(x0.shape)
        return {"gradient": gradient, "energy": energy, "embedding": e}

    def guide_latent(self, **inputs: F32) -> dict[str, Array]:
        """A student that learnt perfectly."""
        return self.guide(**inputs)

    def assess(self, image: F32) -> dict[str, Array]:
        """The redder, the more natural."""
        return {"naturalness": 1 / (1 + np.exp(-9 * image[:, 0].mean(axis=(1, 2))))}

    def step(self, **inputs: Array) -> dict[str, Array]:
        """Row by row and in float64, where the real one computes whole batches."""
        i = inputs
        epsilon = self.denoise(i["latent"], i["timestep"], i["conditioning"])["epsilon"]
        rows = i["coefficients"].astype(np.float64)
        a0, a1, b0, b1, n, g, x0_x, x0_eps = rows.T[:, :, None, None, None]
        asked = {name: i[name] for name in ("anchor", "repel", "attract", "sibling")}
        guided = self.guide((x0_x * i["latent"] + x0_eps * epsilon).astype(np.float32), **asked)
        gradient, e = guided["gradient"].copy(), guided["embedding"]
        pushed = np.ones(len(e))
        for row, own in enumerate(e):
            others = [o for o in range(len(e)) if i["sibling"][min(row, o), max(row, o)] > 0]
            held = any(e[o] @ own > 0 for o in others if o != row)
            towards = own @ i["anchor"][row] * (1 if i["attract"][row] > i["repel"][row] else -1)
            pushed[row] = held or towards < i["release"][row]
            rms = np.sqrt(np.mean(gradient[row] ** 2)) if i["normalise"][row] else 1.0
            gradient[row] *= pushed[row] / rms if rms > 1e-12 else 0.0
        x = a0 * i["latent"] + a1 * i["previous"] + b0 * epsilon + b1 * i["previous_epsilon"]
        x = x + n * i["noise"] - g * gradient
        x = i["background"] + i["mask"] * (x - i["background"])
        return {"next": x, "epsilon": epsilon, "embedding": e, "pushed": pushed}

    def _identify(self, latent: Array) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        features = latent.reshape(len(latent), -1) @ self.identity.T
        length = np.linalg.norm(features, axis=1, keepdims=True) + 1e-9
        return features / length, length


class _FakeEngine:
    def __init__(self, backend: FakeBackend, program: ProgramSpec) -> None:
        self._backend = backend
        self.program = program

    def run(self, **inputs: Array) -> dict[str, Array]:
        check_inputs(self.program, inputs, DIMENSIONS)
        copies = {name: np.array(value) for name, value in inputs.items()}
        self._backend.calls.append((self.program.name, copies))
        return self._backend.compute(self.program.name, copies)

    def close(self) -> None:
        pass
