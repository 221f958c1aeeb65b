"""Tensors of a PyTorch file that pickles whole objects, read without running anything in it.

A file of `torch.save(module)` names classes and functions that unpickling would import and call.
Here nothing is imported or called: tensors are put together by this module, instances of unknown
classes become empty shells that only hold the state they were given, and every other name is
refused.
"""

from __future__ import annotations

import io
import pickle  # noqa: TID251 - the machine below imports nothing and calls nothing of the file's
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from diffveil.errors import OptionError

__all__ = ["read_pickled_tensors"]

_MAX_PROGRAM_BYTES = 16 << 20
_MAX_NODES = 1_000_000
_MAX_DEPTH = 64
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def read_pickled_tensors(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file written by `torch.save`, by dotted name.

    Modules count with their parameters, buffers and submodules, mappings with their text keys and
    sequences with their indices.

    Args:
        file: A zip-based PyTorch file (PyTorch 1.6 or newer).

    Returns:
        Tensors by name, each with memory of its own.

    Raises:
        OptionError: The file is not of this format or damaged, or holds a name other than those of
            tensors, modules and containers; the message names it.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            found = _Archive(archive, file.stat().st_size)
            return dict(_tensors(_Machine(found).load(), file))
    except OptionError as error:
        raise OptionError(f"'{file}': {error}") from error
    except zipfile.BadZipFile as error:
        raise OptionError(
            f"'{file}' is not a zip-based PyTorch file: save it again with PyTorch 1.6 or newer, "
            "or convert it to safetensors"
        ) from error
    except Exception as error:  # what a damaged pickle raises is anybody's guess
        raise OptionError(f"'{file}' is damaged: {type(error).__name__}") from error


@dataclass(frozen=True)
class _Storage:
    """A run of numbers in the archive."""

    dtype: torch.dtype
    key: str
    count: int


class _Archive:
    """The records of a PyTorch file; every size is known before memory is taken."""

    def __init__(self, archive: zipfile.ZipFile, file_bytes: int) -> None:
        self._archive, self._file_bytes = archive, file_bytes
        programs = [n for n in archive.namelist() if n.endswith("data.pkl") and n.count("/") == 1]
        if len(programs) != 1:
            raise OptionError("expected one data.pkl, as torch.save writes it")
        self._prefix = programs[0].removesuffix("data.pkl")
        if f"{self._prefix}byteorder" in archive.namelist():
            order = self.record("byteorder", 16)
            if order != b"little":
                raise OptionError("numbers are not in little-endian order")

    def record(self, name: str, limit: int) -> bytes:
        """Bytes of one record."""
        try:
            info = self._archive.getinfo(self._prefix + name)
        except KeyError:
            raise OptionError(f"record '{name[:60]}' is missing") from None
        # PyTorch never compresses, so no record can be larger than the file.
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > self._file_bytes:
            raise OptionError(f"record '{name[:60]}' is compressed, which PyTorch never does")
        if info.file_size > limit:
            raise OptionError(f"record '{name[:60]}' has more than {limit} bytes")
        return self._archive.read(info)

    def numbers(self, storage: _Storage) -> torch.Tensor:
        """A storage's numbers, [count]."""
        wanted = storage.count * storage.dtype.itemsize
        raw = self.record(f"data/{storage.key}", wanted)
        if len(raw) != wanted:
            raise OptionError(f"storage '{storage.key[:20]}' has {len(raw)} bytes, not {wanted}")
        if not wanted:
            return torch.empty(0, dtype=storage.dtype)
        return torch.frombuffer(bytearray(raw), dtype=storage.dtype)


class _ShellType(type):
    """Class of the shells: called like a function, it refuses; only NEWOBJ makes instances."""

    def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise OptionError(f"it calls '{cls.__module__}.{cls.__name__}', which is not run")


class _Shell(metaclass=_ShellType):
    """Stands for an instance of a class that is not imported."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Machine(pickle.Unpickler):
    """Unpickles tensors, containers and shells."""

    def __init__(self, archive: _Archive) -> None:

        super().__init__(io.BytesIO(archive.record("data.pkl", _MAX_PROGRAM_BYTES)))
        self._archive = archive
        self._read: dict[str, torch.Tensor] = {}
        self._allowed: Mapping[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("builtins", "set"): _as_set,
            ("__builtin__", "set"): _as_set,
            ("torch", "Size"): tuple,
            # Training frameworks note scores as NumPy scalars beside the weights.
            ("numpy", "dtype"): _passed_over,
            ("numpy.core.multiarray", "scalar"): _passed_over,
            ("numpy._core.multiarray", "scalar"): _passed_over,
            ("_codecs", "encode"): _passed_over,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): _parameter,
            **{("torch", name): dtype for name, dtype in _STORAGES.items()},
            **{("torch", str(d).removeprefix("torch.")): d for d in _STORAGES.values()},
        }

    def find_class(self, module: str, name: str) -> Any:
        known = self._allowed.get((module, name))
        if known is not None:
            return known
        top = module.partition(".")[0]
        dangerous = top in sys.stdlib_module_names or top in ("__builtin__", "numpy")
        if dangerous or (top == "torch" and not module.startswith("torch.nn.")) or "." in name:
            raise OptionError(f"it names '{module}.{name}', which is not read")
        return _ShellType(name, (_Shell,), {"__module__": module})

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise OptionError("it refers to something else than a storage")
        _, dtype, key, _, count = pid
        if not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise OptionError("it refers to a storage of unknown kind")
        if type(count) is not int or count < 0:
            raise OptionError("a storage has no size")
        return _Storage(dtype, key, count)

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> torch.Tensor:
        """What `torch._utils._rebuild_tensor_v2` is told, held against the storage first."""
        sizes, strides = _integers(size), _integers(stride)
        if not isinstance(storage, _Storage) or len(sizes) != len(strides) or len(sizes) > 8:
            raise OptionError("a tensor is malformed")
        (start,) = _integers((offset,))
        last = start + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
        if 0 not in sizes and last >= storage.count:
            raise OptionError(f"a tensor of shape {list(sizes)[:8]} reaches beyond its storage")
        if 0 in sizes:
            return torch.empty(sizes, dtype=storage.dtype)
        # A stride of zero makes a large tensor of few numbers: no weight is stored like that.
        if torch.Size(sizes).numel() > storage.count:
            raise OptionError(f"a tensor of shape {list(sizes)[:8]} repeats its storage")
        if storage.key not in self._read:
            self._read[storage.key] = self._archive.numbers(storage)
        numbers = self._read[storage.key]
        if numbers.dtype != storage.dtype or len(numbers) != storage.count:
            raise OptionError("a storage is described in two ways")
        return numbers.as_strided(sizes, strides, start).clone()


def _passed_over(*_: Any) -> _Shell:
    """Stands for a value that is of no interest; nothing is made of what it was told."""
    return object.__new__(_Shell)


def _as_set(items: Any = ()) -> frozenset[Any]:
    return frozenset(i for i in items if isinstance(i, str))


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _integers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)) or any(type(v) is not int or v < 0 for v in values):
        raise OptionError("a tensor's shape is malformed")
    return tuple(values)


def _tensors(root: Any, file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors below `root` by dotted name, in the order of the file."""
    seen = 0

    def walk(node: Any, name: str, depth: int) -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal seen
        seen += 1
        if seen > _MAX_NODES or depth > _MAX_DEPTH:
            raise OptionError("it nests deeper, or holds more, than any model does")
        if isinstance(node, torch.Tensor):
            yield name, node
        elif isinstance(node, _Shell):
            state = node.state if isinstance(node.state, dict) else {}
            for part in ("_parameters", "_buffers", "_modules"):
                yield from walk(state.get(part), name, depth + 1)
        elif isinstance(node, dict):
            for key, value in node.items():
                if isinstance(key, str):
                    yield from walk(value, f"{name}.{key}" if name else key, depth + 1)
        elif isinstance(node, (list, tuple)):
            for index, value in enumerate(node):
                yield from walk(value, f"{name}.{index}" if name else str(index), depth + 1)

    yield from walk(root, "", 0)
