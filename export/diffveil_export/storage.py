"""How weights are stored: rounded on purpose in PyTorch, then written without further loss.

Rounding and writing are two steps. `round_weights` changes the networks themselves, so parity
checks and quality measurements see exactly the numbers that ship. `shrink_initializers` then gives
every ONNX weight the smallest form that reproduces it bit for bit, whatever transposing or folding
happened to it in between, and `DataFile` writes equal weights of several programs once.

    int4     for denoisers and judges: one scale for every 32; `DequantizeLinear` restores float32
    int8     one scale for each output channel; `DequantizeLinear` restores float32
    float16  `Cast` restores float32
    float32  as it is

Engines fold the restoring nodes when they load a program: arithmetic is float32 in all of them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import nn

from diffveil.errors import OptionError
from diffveil_export.blocks import BLOCK, GREATEST, fit_blocks, read_blocks, restore_blocks
from diffveil_export.models.low_rank import FACTORS

__all__ = [
    "WEIGHT_STORAGES",
    "DataFile",
    "StoredWeights",
    "WeightStorage",
    "in_blocks",
    "quantize",
    "round_weights",
    "shrink_initializers",
]

WeightStorage = Literal["float32", "float16", "int8", "int4"]
WEIGHT_STORAGES: tuple[WeightStorage, ...] = get_args(WeightStorage)

_SMALL = 1024
"""Tensors with fewer elements stay float32: norms, biases, scales."""

_LARGE = 1 << 16
"""Tensors with fewer elements are not worth four bits: the first and the last layers are small, and
feel rounding most."""

_EXTERNAL_BYTES = 1024
_ALIGNMENT = 64
_QUANTIZED = (nn.Conv1d, nn.Conv2d, nn.Linear)

_INT4 = ir.DataType.INT4.numpy()
_F32 = NDArray[np.float32]


def round_weights(module: nn.Module, storage: WeightStorage) -> None:
    """Round a network's large weights, in place, to numbers that `storage` represents exactly.

    Under int8, convolutions and linear layers are rounded symmetrically with one scale an output
    channel; other large parameters (embedding tables, position tables) are rounded to float16.
    Under int4, the largest of them are rounded in blocks along their input channels instead, but
    for low-rank changes. Rounding twice changes nothing.

    Args:
        module: Weights in float32.
        storage: How the weights will be stored.

    Raises:
        OptionError: A weight is not finite, or too large for float16 or, in four bits, for seven
            times that.
    """
    if storage == "float32":
        return
    matrices = {id(m.weight) for m in module.modules() if isinstance(m, _QUANTIZED)}
    for name, parameter in module.named_parameters():
        if parameter.numel() < _SMALL or parameter.dtype != torch.float32:
            continue
        weight = parameter.detach().cpu().numpy()
        matrix = storage in ("int4", "int8") and id(parameter) in matrices
        if matrix and storage == "int4" and in_blocks(name, weight.shape):
            if not np.abs(weight).max() <= GREATEST:
                raise OptionError(
                    f"weight '{name}' cannot be stored in int4: not all of it is finite and within "
                    f"±{GREATEST:,.0f}"
                )
            rounded = restore_blocks(*fit_blocks(weight, 1), 1)
        elif matrix:
            rounded = _dequantize(*quantize(weight, 0), 0)
        else:
            with np.errstate(over="ignore"):
                rounded = weight.astype(np.float16).astype(np.float32)
        if not np.isfinite(rounded).all():
            raise OptionError(f"weight '{name}' cannot be stored in {storage}: it is not finite")
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(rounded))


def in_blocks(name: str, shape: Sequence[int]) -> bool:
    """Whether int4 puts a matrix or kernel of this name and shape into blocks of four bits."""
    return math.prod(shape) >= _LARGE and shape[1] % BLOCK == 0 and not name.endswith(FACTORS)


def quantize(weight: _F32, axis: int) -> tuple[NDArray[np.int8], _F32]:
    """Symmetric int8 with one scale an index of `axis`.

    Scales are rounded up to 16 significant bits: then 127·scale is exact in float32, so the largest
    weight of a channel restores the scale and quantizing again finds the same integers.
    """
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scale = (np.abs(weight).max(axis=others).astype(np.float64) / 127).astype(np.float32)
    bits = scale.view(np.uint32)
    scale = ((bits + np.uint32(0xFF)) & np.uint32(0xFFFFFF00)).view(np.float32)
    scale = np.where(scale > 0, scale, np.float32(1)).astype(np.float32)
    shape = [1] * weight.ndim
    shape[axis] = -1
    return np.rint(weight / scale.reshape(shape)).astype(np.int8), scale


def _dequantize(integers: NDArray[np.int8], scale: _F32, axis: int) -> _F32:
    shape = [1] * integers.ndim
    shape[axis] = -1
    return integers.astype(np.float32) * scale.reshape(shape)


def shrink_initializers(model: ir.Model, storage: WeightStorage) -> int:
    """Store each large float32 initializer in the smallest form that reproduces it exactly.

    Args:
        model: Changed in place.
        storage: The smallest form allowed.

    Returns:
        How many initializers were changed.
    """
    if storage == "float32":
        return 0
    changed = 0
    for value in list(model.graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < _SMALL:
            continue
        weight: _F32 = tensor.numpy()
        nodes = _int4_nodes(model, value, weight) if storage == "int4" else []
        if not nodes and storage in ("int4", "int8"):
            nodes = _int8_nodes(model, value, weight)
        nodes = nodes or _float16_nodes(model, value, weight)
        if not nodes:
            continue
        assert value.name is not None
        output = nodes[-1].outputs[0]
        output.dtype, output.shape = tensor.dtype, value.shape
        ir.convenience.replace_all_uses_with(value, output)
        model.graph.insert_before(model.graph[0], nodes)
        del model.graph.initializers[value.name]
        changed += 1
    return changed


def _int4_nodes(model: ir.Model, value: ir.Value, weight: _F32) -> list[ir.Node]:
    if weight.ndim < 2 or weight.size < _LARGE or not np.isfinite(weight).all():
        return []
    for axis in range(weight.ndim):
        found = read_blocks(weight, axis)
        if found is None:
            continue
        name = value.name
        integers = _add_initializer(model, f"{name}.int4", found[0].astype(_INT4))
        half = _add_initializer(model, f"{name}.scale", found[1])
        cast = [ir.AttrInt64("to", int(ir.DataType.FLOAT))]
        scale = ir.Node("", "Cast", [half], cast, outputs=[ir.Value(name=f"{name}.scale.f32")])
        blocks = [ir.AttrInt64("axis", axis), ir.AttrInt64("block_size", BLOCK)]
        output = ir.Value(name=f"{name}.f32")
        inputs = [integers, scale.outputs[0]]
        return [scale, ir.Node("", "DequantizeLinear", inputs, blocks, outputs=[output])]
    return []


def _int8_nodes(model: ir.Model, value: ir.Value, weight: _F32) -> list[ir.Node]:
    if weight.ndim < 2 or not np.isfinite(weight).all():
        return []
    for axis in (0, weight.ndim - 1, *range(1, weight.ndim - 1)):
        integers, scale = quantize(weight, axis)
        if np.array_equal(_dequantize(integers, scale, axis), weight):
            name = value.name
            inputs = [
                _add_initializer(model, f"{name}.int8", integers),
                _add_initializer(model, f"{name}.scale", scale),
            ]
            attributes = [ir.AttrInt64("axis", axis)]
            output = ir.Value(name=f"{name}.f32")
            return [ir.Node("", "DequantizeLinear", inputs, attributes, outputs=[output])]
    return []


def _float16_nodes(model: ir.Model, value: ir.Value, weight: _F32) -> list[ir.Node]:
    with np.errstate(over="ignore"):
        half = weight.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), weight):
        return []
    inputs = [_add_initializer(model, f"{value.name}.float16", half)]
    attributes = [ir.AttrInt64("to", int(ir.DataType.FLOAT))]
    return [ir.Node("", "Cast", inputs, attributes, outputs=[ir.Value(name=f"{value.name}.f32")])]


def _add_initializer(model: ir.Model, name: str, array: NDArray[np.generic]) -> ir.Value:
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    model.graph.register_initializer(value)
    return value


class StoredWeights:
    """Where weights lie in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets: dict[bytes, int] = {}

    @classmethod
    def of(cls, path: Path, programs: Iterable[Path]) -> StoredWeights:
        """Those that programs beside a finished file keep in it."""
        stored = cls(path)
        for program in programs:
            for value in ir.load(program).graph.initializers.values():
                tensor = value.const_value
                if isinstance(tensor, ir.ExternalTensor) and tensor.location == path.name:
                    digest = hashlib.sha256(tensor.tobytes()).digest()
                    stored._offsets[digest] = tensor.offset or 0
        return stored

    def find(self, raw: bytes) -> int | None:
        """Offset of these bytes in the file, or None if no model brought them."""
        return self._offsets.get(hashlib.sha256(raw).digest())


class DataFile(StoredWeights):
    """Collects the weights of several models in one file; equal bytes are written once.

    Args:
        path: File to write; models must be saved beside it.
        shared: A file beside it whose weights need not be written again.
    """

    def __init__(self, path: Path, shared: StoredWeights | None = None) -> None:
        super().__init__(path)
        self._shared = shared
        self._stream = path.open("wb")

    def close(self) -> None:
        """Finish the file."""
        self._stream.close()

    def absorb(self, model: ir.Model) -> tuple[str, ...]:
        """Move the model's initializers, but for small ones, into the file.

        Returns:
            Names of the files that hold them: this one, the shared one, or both.
        """
        homes: dict[str, None] = {}
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < _EXTERNAL_BYTES:
                continue
            raw = tensor.tobytes()
            digest = hashlib.sha256(raw).digest()
            home: StoredWeights = self
            if self._shared is not None and digest in self._shared._offsets:
                home = self._shared
            elif digest not in self._offsets:
                self._stream.write(b"\0" * (-self._stream.tell() % _ALIGNMENT))
                self._offsets[digest] = self._stream.tell()
                self._stream.write(raw)
            homes[home.path.name] = None
            value.const_value = ir.ExternalTensor(
                home.path.name,
                home._offsets[digest],
                len(raw),
                tensor.dtype,
                shape=tensor.shape,  # type: ignore[arg-type]
                name=value.name or "",
                base_dir=self.path.parent,
            )
        return tuple(homes)
