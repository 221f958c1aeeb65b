"""Loads recognizers from files: state dicts of known families, and ONNX graphs of any."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from diffveil.errors import OptionError
from diffveil_export.models.recognizers.ensemble import RecognizerEnsemble
from diffveil_export.models.recognizers.families import network_from_state
from diffveil_export.models.recognizers.onnx_import import Graph, load_onnx
from diffveil_export.models.recognizers.preprocessing import (
    INPUT_FORMATS,
    FacePreprocessing,
    InputFormat,
)
from diffveil_export.sources.states import read_state

__all__ = ["LoadedRecognizer", "load_recognizer"]

_STATE_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_CODE_SUFFIXES = (".torchscript.pt", ".torchscript.pth", ".torchscript", ".ts", ".pt2")
_CODE = (
    "is a program (TorchScript or torch.export), and programs are not run: convert it to ONNX, or "
    "save its state dict as safetensors"
)
_MOVES = {"Cast", "Gather", "Identity", "Slice", "Transpose"}
_SHAPES = {"Constant", "Shape"}
_ARITHMETIC = {"Add", "Div", "Mul", "Sub"}


@dataclass(frozen=True)
class LoadedRecognizer:
    """A recognizer, ready to be put into `Components`.

    Attributes:
        module: Maps RGB crops [B, 3, 112, 112] in [-1, 1], framed as ArcFace's, to unit embeddings
            [B, E]; float32, frozen, in evaluation mode.
        family: Name of the family; of several recognizers their names joined by " + ".
        embedding_width: E.
        provenance: File name, family, SHA-256 and input format of each recognizer, by topic.
    """

    module: nn.Module
    family: str
    embedding_width: int
    provenance: Mapping[str, str]


def load_recognizer(
    paths: Sequence[Path],
    *,
    input_format: str = "auto",
    weights: Sequence[float] | None = None,
) -> LoadedRecognizer:
    """Load one recognizer, or several as a `RecognizerEnsemble`.

    Every recognizer receives the 112-pixel crop in ArcFace's framing, resized where its own input
    has another size. That is what InceptionResnetV1 (FaceNet) gets too, although it was trained on
    wider crops with a margin around the face: its embeddings still tell people apart, but less well
    than in its own framing, and published thresholds do not hold. `input_format` decides about
    channels and values only, never about the framing.

    Args:
        paths: State dicts (.safetensors, .pt, .pth, .bin, .ckpt) of a family in
            `recognizers.families.FAMILIES`, or ONNX files (.onnx).
        input_format: `rgb-unit`, `rgb-255`, `bgr-unit` or `bgr-255`, of all files; `auto` is what
            the family was trained with. An ONNX file is taken for `rgb-unit`, or for `rgb-255` if
            its graph begins with the arithmetic that turns 0…255 into about [-1, 1].
        weights: Weights of the recognizers, see `RecognizerEnsemble`; by default equal.

    Raises:
        OptionError: A file is missing, a program, or of no known family, or cannot be imported;
            the problems of all files are named.
    """
    problems = []
    if not paths:
        problems.append("no recognizer was given: expected at least one file")
    if input_format not in ("auto", *INPUT_FORMATS):
        problems.append(
            f"input format: received '{input_format}', expected auto or one of "
            f"{', '.join(INPUT_FORMATS)}"
        )
    if weights is not None and len(weights) != len(paths):
        problems.append(f"received {len(weights)} weights for {len(paths)} recognizers")
    if problems:
        raise OptionError("; ".join(problems))
    formats: dict[str, InputFormat] = {f: f for f in INPUT_FORMATS}
    members = []
    for path in paths:
        try:
            members.append(_load_member(Path(path), formats.get(input_format)))
        except OptionError as error:
            problems.append(str(error))
    if problems:
        raise OptionError("; ".join(problems))

    provenance: dict[str, str] = {}
    for i, member in enumerate(members):
        topic = "recognizer" if len(members) == 1 else f"recognizer_{i + 1}"
        provenance |= {f"{topic}_{k}": v for k, v in member.provenance.items()}
        if weights is not None:
            provenance[f"{topic}_weight"] = str(weights[i])
    module = members[0].module
    if len(members) > 1:
        module = RecognizerEnsemble([m.module for m in members], weights)
    return LoadedRecognizer(
        module=module.eval().requires_grad_(False),
        family=" + ".join(m.family for m in members),
        embedding_width=sum(m.embedding_width for m in members),
        provenance=provenance,
    )


def _load_member(path: Path, input_format: InputFormat | None) -> LoadedRecognizer:
    if not path.is_file():
        raise OptionError(f"recognizer '{path}' is not a file")
    if _is_program(path):
        raise OptionError(f"recognizer '{path}' {_CODE}")
    if path.suffix == ".onnx":
        network, graph = load_onnx(path)
        channels_last = network.channels_last
        side = network.image_shape[0 if channels_last else 1]
        chosen = input_format or _onnx_format(path, graph)
        module: nn.Module = FacePreprocessing(network, side, chosen, 1.0, channels_last)
        family, width = "onnx", network.embedding_width
    elif path.suffix in _STATE_SUFFIXES:
        bare, family, kind = network_from_state(read_state(path), str(path))
        chosen = input_format or "rgb-unit"
        module = FacePreprocessing(bare, kind.size, chosen, kind.scale)
        with torch.no_grad():
            width = int(module.eval()(torch.zeros(1, 3, 112, 112)).shape[1])
    else:
        raise OptionError(
            f"recognizer '{path}': received a file '{path.suffix}', expected .onnx or one of "
            f"{', '.join(_STATE_SUFFIXES)}"
        )
    provenance = {"file": path.name, "family": family, "sha256": _sha256(path), "input": chosen}
    return LoadedRecognizer(module, family, width, provenance)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _is_program(path: Path) -> bool:
    """Whether the file carries code: by its name, or by the folder that archives keep code in."""
    if path.name.lower().endswith(_CODE_SUFFIXES):
        return True
    if path.suffix not in _STATE_SUFFIXES or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        parts = [name.split("/") for name in archive.namelist()]
    return any(p[-1] == "constants.pkl" or "code" in p[1:-1] for p in parts)


def _onnx_format(path: Path, graph: Graph) -> InputFormat:
    """What a graph expects: its own first arithmetic, if it has any, tells.

    Raises:
        OptionError: The graph computes with its input, but not as if that were 0…255.
    """
    constants = dict(graph.constants)
    for node in graph.nodes:
        if node.op == "Constant" and "value" in node.attributes:
            constants[node.outputs[0]] = node.attributes["value"]
    found: set[tuple[float, float]] = set()
    waiting = [(graph.input, (0.0, 255.0))]
    while waiting:  # a graph may use the image twice: as it is, and mirrored
        name, ends = waiting.pop()
        for node in (node for node in graph.nodes if name in node.inputs):
            other = [constants[n] for n in node.inputs if n != name and n in constants]
            if node.op in _ARITHMETIC and len(other) == 1 and other[0].size:
                value, first = float(other[0].mean()), node.inputs[0] == name
                low, high = (_apply(node.op, end, value, first) for end in ends)
                waiting.append((node.outputs[0], (low, high)))
            elif node.op in _MOVES:
                waiting.append((node.outputs[0], ends))
            elif node.op not in _SHAPES:
                found.add(ends)
    if found == {(0.0, 255.0)}:
        return "rgb-unit"
    # [-1, 1], [0, 1], or divided by the standard deviations of photos: -2.2…2.7.
    if all(-4 <= min(ends) <= 0.5 <= max(ends) <= 4 for ends in found):
        return "rgb-255"
    ranges = ", ".join(f"{low:.4g}…{high:.4g}" for low, high in sorted(found))
    raise OptionError(
        f"'{path}' turns 0…255 into {ranges}, so it expects other values: say which, as one of "
        f"{', '.join(INPUT_FORMATS)}"
    )


def _apply(op: str, end: float, value: float, first: bool) -> float:
    if op == "Add":
        return end + value
    if op == "Mul":
        return end * value
    if op == "Sub":
        return end - value if first else value - end
    numerator, divisor = (end, value) if first else (value, end)
    return numerator / divisor if divisor else float("inf")
