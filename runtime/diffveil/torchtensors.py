"""Tensors out of a file written by `torch.save`, without PyTorch and without unpickling.

Such a file is a zip archive of a pickle, which is a program, and of the numbers it refers to. The
program is not run: this module steps through its instructions, follows the few that `torch.save`
emits for tensors in lists, and refuses all others. Nothing is imported and nothing called, and
every size is checked against the file's before memory is taken.

Sources: PyTorch's serialization notes (the zip layout); Python's `pickletools` (the instructions).
"""

from __future__ import annotations

import io
import math
import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from diffveil.errors import KeyFileError

__all__ = ["MAX_TENSOR_FILE_BYTES", "read_tensors"]

MAX_TENSOR_FILE_BYTES = 16 << 20

_MAX_PROGRAM_BYTES = 64 << 10
_MAX_RECORDS = 64
_MAX_TENSORS = 64
_MAX_AXES = 8

_Array = npt.NDArray[np.floating[Any]]

_STORAGES: dict[str, np.dtype[Any]] = {
    "torch FloatStorage": np.dtype("<f4"),
    "torch HalfStorage": np.dtype("<f2"),
}
_REBUILD = "torch._utils _rebuild_tensor_v2"
_ORDERED_DICT = "collections OrderedDict"
_MARK = object()


def read_tensors(data: bytes) -> list[_Array]:
    """Read a tensor, or a list or tuple of tensors.

    Args:
        data: the whole file.

    Returns:
        The tensors, float32 or float16, of any shape: read-only views of the file's numbers.

    Raises:
        KeyFileError: it is not such a file, or holds anything else; the message says what.
    """
    if len(data) > MAX_TENSOR_FILE_BYTES:
        raise KeyFileError(f"The tensor file is larger than {MAX_TENSOR_FILE_BYTES} bytes.")
    if data.count(b"PK\x01\x02") > _MAX_RECORDS:
        _refuse(f"it has more than {_MAX_RECORDS} records")
    reason = ""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            root = _Machine(archive).run()
    except KeyFileError:
        raise
    except zipfile.BadZipFile:
        reason = "it is not a zip archive, as PyTorch 1.6 and newer write it, or a damaged one"
    except Exception as error:  # what a hostile archive raises is anybody's guess
        reason = f"it is damaged ({type(error).__name__})"
    if reason:
        _refuse(reason)
    found = list(root) if isinstance(root, (list, tuple)) else [root]
    if not 1 <= len(found) <= _MAX_TENSORS or not all(isinstance(f, np.ndarray) for f in found):
        _refuse(f"it holds something else than 1 to {_MAX_TENSORS} tensors")
    return found


def _refuse(reason: str) -> NoReturn:
    raise KeyFileError(f"This is not a file of tensors that can be read: {reason}.")


@dataclass(frozen=True)
class _Global:
    """A name that the program refers to: module and name."""

    name: str


@dataclass(frozen=True)
class _Storage:
    """A record of numbers."""

    dtype: np.dtype[Any]
    key: str
    count: int


class _Machine:
    """A stack and a memo, as pickle has them, of inert values."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        programs = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(programs) != 1 or programs[0].count("/") != 1:
            _refuse("it must hold one data.pkl, as torch.save writes it")
        self._prefix = programs[0].removesuffix("data.pkl")
        self._read: dict[str, bytes] = {}
        self._allowance = MAX_TENSOR_FILE_BYTES  # records may overlap, and be read for each name
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        order = f"{self._prefix}byteorder"
        if order in archive.namelist() and self._record("byteorder", 16) != b"little":
            _refuse("its numbers are not in little-endian order")

    def run(self) -> Any:
        """Step through the program; return what it leaves."""
        program = self._record("data.pkl", _MAX_PROGRAM_BYTES)
        for instruction, argument, _ in pickletools.genops(program):
            name = instruction.name
            if name in ("PROTO", "FRAME"):
                continue
            if name == "STOP":
                break
            step = getattr(self, f"_{name.lower()}", None)
            if step is not None:
                step(argument)
            elif name in _PUSHED:
                self._stack.append(argument)
            elif name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name]())
            else:
                _refuse(f"it holds the pickle instruction {name}, which no file of tensors needs")
        (root,) = self._stack
        return root

    def _record(self, name: str, limit: int) -> bytes:
        if name not in self._read:
            info = self._archive.getinfo(self._prefix + name)
            # PyTorch never compresses, so no record can be larger than the file.
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > limit:
                _refuse(f"a record is compressed or has more than {limit} bytes")
            self._allowance -= info.file_size
            if self._allowance < 0:
                _refuse("its records are larger than the file")
            self._read[name] = self._archive.read(info)
        return self._read[name]

    def _pop_marked(self) -> list[Any]:
        """All that was pushed since the last mark."""
        place = next(i for i in reversed(range(len(self._stack))) if self._stack[i] is _MARK)
        items = self._stack[place + 1 :]
        del self._stack[place:]
        return items

    # One method for each instruction that does more than push a value.

    def _mark(self, _: Any) -> None:
        self._stack.append(_MARK)

    def _tuple(self, _: Any) -> None:
        self._stack.append(tuple(self._pop_marked()))

    def _tuple1(self, _: Any) -> None:
        self._stack[-1:] = [tuple(self._stack[-1:])]

    def _tuple2(self, _: Any) -> None:
        self._stack[-2:] = [tuple(self._stack[-2:])]

    def _tuple3(self, _: Any) -> None:
        self._stack[-3:] = [tuple(self._stack[-3:])]

    def _append(self, _: Any) -> None:
        item = self._stack.pop()
        self._list_on_top().append(item)

    def _appends(self, _: Any) -> None:
        items = self._pop_marked()
        self._list_on_top().extend(items)

    def _list_on_top(self) -> list[Any]:
        target = self._stack[-1]
        if not isinstance(target, list):
            _refuse("its program is malformed")
        return target

    def _binput(self, place: int) -> None:
        self._memo[place] = self._stack[-1]

    _long_binput = _binput

    def _memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _binget(self, place: int) -> None:
        self._stack.append(self._memo[place])

    _long_binget = _binget

    def _global(self, name: str) -> None:
        if name not in _STORAGES and name not in (_REBUILD, _ORDERED_DICT):
            _refuse("it names something else than tensors, which is not read")
        self._stack.append(_Global(name))

    def _stack_global(self, _: Any) -> None:
        module, name = self._stack[-2:]
        del self._stack[-2:]
        self._global(f"{module} {name}")

    def _binpersid(self, _: Any) -> None:
        kind, storage, key, _device, count = self._stack.pop()
        dtype = _STORAGES.get(storage.name)
        if kind != "storage" or dtype is None or not isinstance(key, str) or type(count) is not int:
            _refuse("it refers to something else than a storage of floating-point numbers")
        self._stack.append(_Storage(dtype, key, count))

    def _reduce(self, _: Any) -> None:
        function, arguments = self._stack[-2:]
        del self._stack[-2:]
        if function == _Global(_ORDERED_DICT) and arguments == ():
            self._stack.append(None)
        elif function == _Global(_REBUILD):
            self._stack.append(self._tensor(*arguments[:4]))
        else:
            _refuse("it calls something else than what makes a tensor, which is not run")

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> _Array:
        if not isinstance(storage, _Storage) or not _whole((offset, storage.count)):
            _refuse("a tensor is malformed")
        if not _whole(shape) or not _whole(strides) or len(shape) > _MAX_AXES:
            _refuse("a tensor's shape is malformed")
        if len(strides) != len(shape) or not _is_contiguous(shape, strides):
            _refuse("a tensor is not contiguous: save it again after .contiguous()")
        count = math.prod(shape)
        limit = storage.count * storage.dtype.itemsize
        raw = self._record(f"data/{storage.key}", min(limit, MAX_TENSOR_FILE_BYTES))
        if len(raw) != limit or offset + count > storage.count or not count:
            _refuse("a tensor is empty or reaches beyond its numbers")
        flat = np.frombuffer(raw, storage.dtype, count, offset * storage.dtype.itemsize)
        tensor: _Array = flat.reshape(shape)
        return tensor


_PUSHED = frozenset({"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE"})
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "NONE": lambda: None,
}


def _whole(values: Any) -> bool:
    """Whether these are whole numbers from zero, in a tuple."""
    return isinstance(values, tuple) and all(type(v) is int and v >= 0 for v in values)


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the numbers lie row by row; the strides of axes of one item do not matter."""
    rest = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != rest:
            return False
        rest *= size
    return True
