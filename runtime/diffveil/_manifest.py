"""The manifest of a bundle, `bundle.json`, version 1: its fields, and the strict reader.

Everything unknown is refused, so that a manifest means the same to every reader, and every problem
of one manifest is reported at once, by the field's path.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from diffveil.errors import BundleError, BundleVersionError
from diffveil.programs import (
    ALL_PROGRAMS,
    OPTIONAL_PROGRAMS,
    PROGRAMS,
    STAGES,
    Dimensions,
    ProgramSpec,
    TensorSpec,
)
from diffveil.schedule import NoiseSchedule

__all__ = [
    "FORMAT",
    "VERSION",
    "Cost",
    "FileEntry",
    "Manifest",
    "ParityEntry",
    "ProgramEntry",
    "TensorEntry",
    "parse_manifest",
]

FORMAT = "diffveil-bundle"
VERSION = 1

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_BYTES = 1 << 40
_MAX_SIDE = 4096
_MAX_WIDTH = 65536
_MAX_TEXT = 10_000
_PRECISIONS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle: name inside the folder, SHA-256 in hex, size in bytes."""

    name: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class TensorEntry:
    """A graph input or output as exported; engines cast to `dtype` from the interface's dtype."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class ParityEntry:
    """How far one output was from PyTorch when the program was exported.

    Attributes:
        output: Name of the output.
        batch: Batch size of the comparison.
        max_abs: Largest absolute difference.
        max_rel: Largest absolute difference over the largest absolute reference value.
        psnr: Peak signal to noise ratio in dB; None where both agree bit for bit.
        cosine: Cosine of the two outputs as vectors, the smallest of all faces; None if not taken.
        norm_ratio: Norm of the output over that of the reference, the farthest from one of all
            faces; None if not taken.
    """

    output: str
    batch: int
    max_abs: float
    max_rel: float
    psnr: float | None
    cosine: float | None = None
    norm_ratio: float | None = None


@dataclass(frozen=True)
class Cost:
    """What one call of a program takes, counted on its graph with a batch of one.

    Attributes:
        flops: Floating-point operations; a multiply-add counts as two.
        weight_bytes: Bytes of constants, in the types they are computed with.
        activation_bytes: Bytes that all nodes write.
    """

    flops: int
    weight_bytes: int
    activation_bytes: int


@dataclass(frozen=True)
class ProgramEntry:
    """A program: its ONNX file, the weight files that it refers to, its tensors and parity.

    Attributes:
        file: The ONNX file.
        data: Names of the weight files.
        inputs: Graph inputs.
        outputs: Graph outputs.
        parity: Comparisons with PyTorch at export.
        precision: Type that the program computes in, "float32", "float16" or "bfloat16"; parts
            that need it compute in float32 in any case.
        loss_scale: Factor by which `guide` multiplies its energy before the way back, and divides
            the gradient after it; None for other programs.
        cost: Operations and bytes; None where the exporter did not count them.
        parts: Programs that this one was composed of; none but for `step`.
    """

    file: FileEntry
    data: tuple[str, ...]
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    parity: tuple[ParityEntry, ...]
    precision: str = "float32"
    loss_scale: float | None = None
    cost: Cost | None = None
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """What `bundle.json` states.

    Attributes:
        name: Name of the model.
        dimensions: Sizes of the programs' fixed axes.
        schedule: The noise schedule that the diffusion model was trained with.
        prediction: What `denoise` returns; "epsilon".
        template: Five landmarks in a crop, (x, y) in pixels: eyes, nose, mouth corners.
        thresholds: Cosine thresholds of `recognize` by false accept rate.
        licence: Licence of the weights.
        provenance: Where weights and programs come from, by topic.
        programs: Entries by program name.
        files: All other files by name.
    """

    name: str
    dimensions: Dimensions
    schedule: NoiseSchedule
    prediction: str
    template: tuple[tuple[float, float], ...]
    thresholds: Mapping[str, float]
    licence: str
    provenance: Mapping[str, str]
    programs: Mapping[str, ProgramEntry]
    files: Mapping[str, FileEntry]

    def all_files(self) -> Iterator[FileEntry]:
        """Every file that belongs to the bundle, programs first."""
        for program in self.programs.values():
            yield program.file
        yield from self.files.values()


class _Reader:
    """Takes typed fields out of nested JSON objects and collects what is wrong with them."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def wrong(self, path: str, expected: str) -> None:
        self.problems.append(f"{path}: expected {expected}")

    def object(
        self,
        value: Any,
        path: str,
        known: tuple[str, ...] | None,
        optional: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.wrong(path, "an object")
            return {}
        if known is not None:
            where = "" if path == "manifest" else f"{path}."
            self.problems += [
                f"{where}{k}: unknown field" for k in value if k not in known + optional
            ]
            self.problems += [f"{where}{k}: missing" for k in known if k not in value]
        return value

    def array(self, value: Any, path: str, limit: int) -> list[Any]:
        if not isinstance(value, list) or len(value) > limit:
            self.wrong(path, f"an array of at most {limit} elements")
            return []
        return value

    def integer(self, value: Any, path: str, limit: int, low: int = 1) -> int:
        if type(value) is not int or not low <= value <= limit:
            self.wrong(path, f"an integer in {low}…{limit}")
            return low
        return value

    def number(self, value: Any, path: str, low: float, high: float) -> float:
        # Infinite and NaN fail the comparison; an integer too large for a float must not reach it.
        if type(value) not in (int, float) or not low <= value <= high:
            self.wrong(path, f"a number in {low:g}…{high:g}")
            return low
        return float(value)

    def text(self, value: Any, path: str, pattern: re.Pattern[str] | None = None) -> str:
        if not isinstance(value, str) or len(value) > _MAX_TEXT:
            self.wrong(path, "text")
            return ""
        if pattern is not None and not pattern.fullmatch(value):
            self.wrong(path, f"text that matches {pattern.pattern}")
        return value

    def mapping(
        self, value: Any, path: str, read: Callable[[Any, str], Any], limit: int = 100
    ) -> dict[str, Any]:
        items = self.object(value, path, None)
        if len(items) > limit:
            self.wrong(path, f"at most {limit} fields")
            return {}
        return {k: read(v, f"{path}.{k}") for k, v in items.items() if k}

    def file(self, value: Any, path: str, name: str) -> FileEntry:
        fields = self.object(value, path, ("sha256", "bytes"))
        return self._file(fields, path, name)

    def _file(self, fields: Mapping[str, Any], path: str, name: str) -> FileEntry:
        return FileEntry(
            name=self.text(name, f"{path}.file", _FILE_NAME),
            sha256=self.text(fields.get("sha256"), f"{path}.sha256", _SHA256),
            bytes=self.integer(fields.get("bytes"), f"{path}.bytes", _MAX_BYTES),
        )

    def program(
        self, value: Any, path: str, spec: ProgramSpec, dimensions: Dimensions
    ) -> ProgramEntry:
        known = ("file", "sha256", "bytes", "data", "inputs", "outputs", "parity")
        fields = self.object(value, path, known, ("precision", "loss_scale", "cost", "parts"))
        precision = fields.get("precision", "float32")
        if precision not in _PRECISIONS:
            self.wrong(f"{path}.precision", " or ".join(_PRECISIONS))
        scale = fields.get("loss_scale")
        cost = fields.get("cost")
        names = self.array(fields.get("data"), f"{path}.data", 16)
        rows = self.array(fields.get("parity"), f"{path}.parity", 100)
        parts = self.array(fields.get("parts", []), f"{path}.parts", 16)
        if any(not isinstance(name, str) or name not in ALL_PROGRAMS for name in parts):
            self.wrong(f"{path}.parts", "names of programs")
        return ProgramEntry(
            file=self._file(fields, path, fields.get("file", "")),
            data=tuple(self.text(n, f"{path}.data", _FILE_NAME) for n in names),
            inputs=self._tensors(fields.get("inputs"), f"{path}.inputs", spec.inputs, dimensions),
            outputs=self._tensors(
                fields.get("outputs"), f"{path}.outputs", spec.outputs, dimensions
            ),
            parity=tuple(self._parity(r, f"{path}.parity[{i}]") for i, r in enumerate(rows)),
            precision=str(precision),
            loss_scale=(
                None if scale is None else self.number(scale, f"{path}.loss_scale", 1e-12, 1e12)
            ),
            cost=None if cost is None else self._cost(cost, f"{path}.cost"),
            parts=tuple(name for name in parts if isinstance(name, str)),
        )

    def _cost(self, value: Any, path: str) -> Cost:
        names = ("flops", "weight_bytes", "activation_bytes")
        fields = self.object(value, path, names)
        return Cost(*(self.integer(fields.get(n), f"{path}.{n}", 1 << 60, 0) for n in names))

    def _tensors(
        self, value: Any, path: str, specs: tuple[TensorSpec, ...], dimensions: Dimensions
    ) -> tuple[TensorEntry, ...]:
        rows = self.array(value, path, 16)
        if len(rows) != len(specs):
            self.wrong(path, f"the tensors {', '.join(s.name for s in specs)}")
            return ()
        entries = []
        for row, spec in zip(rows, specs, strict=True):
            where = f"{path}.{spec.name}"
            fields = self.object(row, where, ("name", "dtype", "shape"))
            dtype, shape = fields.get("dtype"), spec.shape(dimensions)
            allowed = _PRECISIONS if spec.dtype == "float32" else (spec.dtype,)
            if fields.get("name") != spec.name:
                self.wrong(f"{where}.name", f"'{spec.name}'")
            if dtype not in allowed:
                self.wrong(f"{where}.dtype", " or ".join(allowed))
            if fields.get("shape") != list(shape):
                self.wrong(f"{where}.shape", f"{list(shape)}")
            entries.append(TensorEntry(spec.name, str(dtype), shape))
        return tuple(entries)

    def _parity(self, value: Any, path: str) -> ParityEntry:
        known = ("output", "batch", "max_abs", "max_rel", "psnr")
        fields = self.object(value, path, known, ("cosine", "norm_ratio"))

        def maybe(name: str, low: float, high: float) -> float | None:
            given = fields.get(name)
            return None if given is None else self.number(given, f"{path}.{name}", low, high)

        return ParityEntry(
            output=self.text(fields.get("output"), f"{path}.output"),
            batch=self.integer(fields.get("batch"), f"{path}.batch", 1 << 16),
            max_abs=self.number(fields.get("max_abs"), f"{path}.max_abs", 0.0, 1e30),
            max_rel=self.number(fields.get("max_rel"), f"{path}.max_rel", 0.0, 1e30),
            psnr=maybe("psnr", -1e3, 1e4),
            cosine=maybe("cosine", -1.001, 1.001),
            norm_ratio=maybe("norm_ratio", 0.0, 1e30),
        )


_FIELDS = (
    "format",
    "version",
    "name",
    "image_size",
    "latent",
    "tokens",
    "conditioning",
    "embedding",
    "schedule",
    "prediction",
    "template",
    "thresholds",
    "licence",
    "provenance",
    "programs",
    "files",
)


def parse_manifest(content: Any) -> Manifest:
    """Check the decoded JSON of a manifest and turn it into a `Manifest`.

    Args:
        content: What `json.loads` returned.

    Raises:
        BundleError: It is not a manifest, or fields are missing, unknown or wrong.
        BundleVersionError: It was written in a version that this diffveil does not read.
    """
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BundleError(f"not a bundle manifest: field 'format' is not '{FORMAT}'")
    if content.get("version") != VERSION:
        raise BundleVersionError(
            f"bundle format version {str(content.get('version'))[:20]} is not {VERSION}, the one "
            "this diffveil reads: update diffveil, or export the bundle again"
        )
    r = _Reader()
    top = r.object(content, "manifest", _FIELDS)

    latent = r.object(top.get("latent"), "latent", ("channels", "size"))
    tokens = r.object(top.get("tokens"), "tokens", ("stages", "width"))
    conditioning = r.object(top.get("conditioning"), "conditioning", ("length", "width"))
    embedding = r.object(top.get("embedding"), "embedding", ("width",))
    dimensions = Dimensions(
        image_size=r.integer(top.get("image_size"), "image_size", _MAX_SIDE),
        latent_channels=r.integer(latent.get("channels"), "latent.channels", _MAX_WIDTH),
        latent_size=r.integer(latent.get("size"), "latent.size", _MAX_SIDE),
        token_width=r.integer(tokens.get("width"), "tokens.width", _MAX_WIDTH),
        conditioning_length=r.integer(
            conditioning.get("length"), "conditioning.length", _MAX_WIDTH
        ),
        conditioning_width=r.integer(conditioning.get("width"), "conditioning.width", _MAX_WIDTH),
        embedding_width=r.integer(embedding.get("width"), "embedding.width", _MAX_WIDTH),
    )
    if tokens.get("stages") != STAGES:
        r.wrong("tokens.stages", str(STAGES))
    if top.get("prediction") != "epsilon":
        r.wrong("prediction", "'epsilon'")

    template = [
        tuple(
            r.number(x, f"template[{i}]", -_MAX_SIDE, 2 * _MAX_SIDE)
            for x in r.array(point, f"template[{i}]", 2)
        )
        for i, point in enumerate(r.array(top.get("template"), "template", 5))
    ]
    if [len(point) for point in template] != [2] * 5:
        r.wrong("template", "five points (x, y)")

    entries = r.object(top.get("programs"), "programs", tuple(PROGRAMS), tuple(OPTIONAL_PROGRAMS))
    programs = {
        name: r.program(entries.get(name), f"programs.{name}", spec, dimensions)
        for name, spec in ALL_PROGRAMS.items()
        if name in PROGRAMS or name in entries
    }
    files = {
        name: r.file(value, f"files.{name[:128]}", name)
        for name, value in r.object(top.get("files"), "files", None).items()
    }
    needed = {"constants.safetensors", *(d for p in programs.values() for d in p.data)}
    r.problems += [f"files.{name}: missing" for name in sorted(needed - set(files))]
    schedule = _schedule(r, top.get("schedule"))
    name, licence = r.text(top.get("name"), "name"), r.text(top.get("licence"), "licence")
    thresholds = r.mapping(
        top.get("thresholds"), "thresholds", lambda v, p: r.number(v, p, -1.0, 1.0)
    )
    provenance = r.mapping(top.get("provenance"), "provenance", lambda v, p: r.text(v, p))
    if r.problems:
        raise BundleError("malformed bundle manifest: " + "; ".join(r.problems[:20]))
    return Manifest(
        name=name,
        dimensions=dimensions,
        schedule=schedule,
        prediction="epsilon",
        template=tuple((x, y) for x, y in template),
        thresholds=thresholds,
        licence=licence,
        provenance=provenance,
        programs=programs,
        files=files,
    )


def _schedule(r: _Reader, value: Any) -> NoiseSchedule:
    fields = r.object(value, "schedule", ("kind", "steps", "beta_start", "beta_end"))
    if fields.get("kind") != "scaled-linear":
        r.wrong("schedule.kind", "'scaled-linear'")
    if fields.get("steps") != 1000:  # stages and timesteps are defined on 1000 steps
        r.wrong("schedule.steps", "1000")
    start = r.number(fields.get("beta_start"), "schedule.beta_start", 1e-8, 0.5)
    end = r.number(fields.get("beta_end"), "schedule.beta_end", 1e-8, 0.5)
    if start > end:
        r.wrong("schedule.beta_end", "a number not below schedule.beta_start")
    if r.problems:
        return NoiseSchedule()
    return NoiseSchedule(steps=1000, beta_start=start, beta_end=end)
