"""Golden data: inputs and the outputs that PyTorch computed for them travel in the bundle.

`golden.safetensors` holds `inputs.<tensor>`, shared by all programs that take a tensor of that
name, and `outputs.<program>.<tensor>`. A program's batch is that of its outputs; it reads as many
rows of its inputs. So any machine and backend can be held against the exporter's PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from diffveil.bundle import GOLDEN_FILE, Bundle
from diffveil.engines import (
    REFERENCE,
    Array,
    Availability,
    Backend,
    Engine,
    Examine,
    ONNXRuntimeCPU,
)
from diffveil.errors import (
    BackendUnavailableError,
    BundleError,
    EngineError,
)
from diffveil.parity import OutputParity, compare, describe
from diffveil.programs import ALL_PROGRAMS, DYNAMIC_AXES, ProgramSpec, TensorSpec

__all__ = [
    "GOLDEN_FILE",
    "GoldenCheck",
    "check_backend",
    "examiner",
    "load_golden",
    "require_golden",
]

_MAX_GOLDEN_BYTES = 256 << 20
_PAIRS = ("B", "B")

_Tensors = dict[str, NDArray[np.generic]]
_Floats: TypeAlias = "NDArray[np.floating[Any]]"


def load_golden(bundle: Bundle) -> _Tensors:
    """The tensors of a bundle's golden file, inputs in the dtype that programs take.

    Raises:
        BundleError: The bundle carries none, or its tensors are not those of its programs.
        BundleCorruptError: The file differs from its hash.
    """
    if not bundle.has_golden:
        raise BundleError(
            f"bundle '{bundle.name}' carries no {GOLDEN_FILE}, so there is nothing to hold a "
            "backend against: export it again with this diffveil"
        )
    return _checked(bundle, bundle.tensors(GOLDEN_FILE, _MAX_GOLDEN_BYTES))


def _checked(bundle: Bundle, tensors: _Tensors) -> _Tensors:
    """Hold every tensor against the declaration of its program; inputs get their dtype."""
    result: _Tensors = {}
    problems = []
    for program in bundle.manifest.programs:
        spec = ALL_PROGRAMS[program]
        for output in spec.outputs:
            name = f"outputs.{program}.{output.name}"
            problem = _problem(bundle, output, tensors.get(name), ("float32",))
            if problem:
                problems.append(f"{name}: {problem}")
            else:
                result[name] = tensors[name]
        rows = _rows(result, program)
        for tensor in spec.inputs:
            name = f"inputs.{tensor.name}"
            stored = (tensor.dtype, "float16") if tensor.dtype == "float32" else (tensor.dtype,)
            array = tensors.get(name)
            problem = _problem(bundle, tensor, array, stored)
            if not problem and array is not None and len(array) < rows:
                problem = f"received {len(array)} rows, expected at least {rows}"
            if problem:
                problems.append(f"{name}: {problem}")
            elif array is not None:
                result[name] = array.astype(tensor.dtype)
    if problems:
        raise BundleError(f"'{GOLDEN_FILE}': " + "; ".join(sorted(set(problems))))
    return result


def _problem(
    bundle: Bundle, tensor: TensorSpec, array: NDArray[np.generic] | None, dtypes: tuple[str, ...]
) -> str:
    if array is None:
        return "missing"
    expected = tensor.shape(bundle.dimensions)
    fits = array.ndim == len(expected) and all(
        size > 0 if isinstance(axis, str) else size == axis
        for axis, size in zip(expected, array.shape, strict=True)
    )
    if fits and str(array.dtype) in dtypes:
        return ""
    return (
        f"received {array.dtype} {list(array.shape)}, expected {' or '.join(dtypes)} "
        f"[{', '.join(str(axis) for axis in expected)}]"
    )


def _rows(tensors: _Tensors, program: str) -> int:
    sizes = [len(a) for name, a in tensors.items() if name.startswith(f"outputs.{program}.")]
    return max(sizes, default=1)


def check_backend(
    bundle: Bundle,
    backend: Backend,
    *,
    programs: Iterable[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[OutputParity, ...]:
    """Run programs on their golden inputs and compare the outputs with PyTorch's.

    Args:
        bundle: A bundle with golden data.
        backend: What runs the programs; each is loaded, run once and closed.
        programs: Names; by default all that the bundle holds.
        progress: Told the name of each program before it is loaded.

    Returns:
        One row an output; a row is true if it is within the tolerance of the program's precision.

    Raises:
        BundleError: There is no such program, or no golden data.
        EngineError: The backend cannot load or run a program.
    """
    golden = GoldenCheck(bundle)
    rows: list[OutputParity] = []
    for name in bundle.manifest.programs if programs is None else programs:
        bundle.program(name)
        if progress is not None:
            progress(name)
        engine = backend.load(bundle, name)
        try:
            rows += golden.compare(engine)
        finally:
            engine.close()
    return tuple(rows)


class Piece(NamedTuple):
    """Rows of golden inputs that go through an engine in one call.

    Attributes:
        rows: Their numbers, repeated as often as the engine needs rows.
        kept: How many of them are not repetitions.
    """

    rows: NDArray[np.intp]
    kept: int


def pieces_of(count: int, least: int, most: int) -> list[Piece]:
    """Cut rows as an engine takes them that was built for `least` to `most`; all if it can."""
    bounds = [*range(0, count, most), count]
    return [
        Piece(np.resize(np.arange(start, stop), max(stop - start, least)), stop - start)
        for start, stop in pairwise(bounds)
    ]


def run_pieces(
    engine: Engine, feed: Mapping[str, Array], pieces: Sequence[Piece]
) -> dict[str, Array]:
    """Run an engine on all rows, piece by piece; its outputs, one below the other."""
    spec, parts = engine.program, []
    for rows, kept in pieces:
        given = {}
        for tensor in spec.inputs:
            array = feed[tensor.name][rows]
            if tensor.axes == _PAIRS:
                # Repetitions of a row are no siblings of what they repeat.
                copy = np.arange(len(rows)) // kept
                array = np.where(copy[:, None] == copy, array[:, rows], np.zeros((), array.dtype))
            given[tensor.name] = np.ascontiguousarray(array)
        outputs = engine.run(**given)
        parts.append({name: array[:kept] for name, array in outputs.items()})
    return {t.name: np.concatenate([part[t.name] for part in parts]) for t in spec.outputs}


def _torn(spec: ProgramSpec, feed: Mapping[str, Array], pieces: Sequence[Piece]) -> bool:
    """Whether pairs of rows that influence each other are in different pieces."""
    piece_of = np.concatenate([np.full(p.kept, i) for i, p in enumerate(pieces)])
    apart = np.triu(piece_of[:, None] != piece_of, 1)
    return any(feed[t.name][apart].any() for t in spec.inputs if t.axes == _PAIRS)


class GoldenCheck:
    """Judges engines one by one; golden data is read when the first one comes.

    An engine that was built for other batches than the golden data's gets its rows as it takes
    them.

    Args:
        bundle: A bundle with golden data.
        reference: Makes the backend that is asked where golden data has no answer.
    """

    def __init__(self, bundle: Bundle, reference: Callable[[], Backend] = ONNXRuntimeCPU) -> None:
        self._bundle, self._reference = bundle, reference

    @cached_property
    def _tensors(self) -> _Tensors:
        return load_golden(self._bundle)

    def compare(self, engine: Engine) -> tuple[OutputParity, ...]:
        """Run an engine on its program's golden inputs; one row an output.

        Raises:
            BundleError: The bundle has no golden data.
            EngineError: The engine fails.
        """
        spec, entry = engine.program, self._bundle.program(engine.program.name)
        count = _rows(self._tensors, spec.name)
        feed = {}
        for tensor in spec.inputs:
            # A matrix of pairs is cut in both dimensions.
            cut = tuple(slice(count if a in DYNAMIC_AXES else None) for a in tensor.axes)
            feed[tensor.name] = np.ascontiguousarray(self._tensors[f"inputs.{tensor.name}"][cut])
        expected = {t.name: self._tensors[f"outputs.{spec.name}.{t.name}"] for t in spec.outputs}
        pieces = pieces_of(count, *getattr(engine, "batches", (1, count)))
        if _torn(spec, feed, pieces):
            expected = self._expected_of_pieces(spec.name, feed, pieces)
        outputs = run_pieces(engine, feed, pieces)
        return tuple(
            compare(
                spec.name,
                output.name,
                count,
                cast(_Floats, expected[output.name]),
                cast(_Floats, outputs[output.name]),
                entry.precision,
            )
            for output in spec.outputs
        )

    def _expected_of_pieces(
        self, program: str, feed: Mapping[str, Array], pieces: Sequence[Piece]
    ) -> dict[str, Array]:
        """What a program gives where rows that belong together cannot go together.

        Golden data has no such outputs. The reference backend gives them, once it has given the
        golden ones.
        """
        try:
            engine = self._reference().load(self._bundle, program)
        except BackendUnavailableError as error:
            raise EngineError(
                f"program '{program}' takes fewer rows than the golden data's, which belong "
                f"together, and there is nothing else to hold it against: {error}"
            ) from error
        try:
            wrong = describe(self.compare(engine))
            if wrong:
                raise EngineError(
                    f"the reference computes something else than PyTorch did: {wrong}"
                )
            return run_pieces(engine, feed, pieces)
        finally:
            engine.close()

    def require(self, engine: Engine) -> None:
        """Refuse an engine that computes something else than the exporter's PyTorch did.

        Raises:
            BundleError: The bundle has no golden data.
            EngineError: The engine fails, or an output is not within tolerance.
        """
        wrong = describe(self.compare(engine))
        if wrong:
            raise EngineError(f"it computes something else than PyTorch did: {wrong}")


def require_golden(bundle: Bundle, backend: Backend) -> None:
    """Refuse a backend that computes something else than the exporter's PyTorch did.

    Args:
        bundle: A bundle with golden data.
        backend: The backend to judge; every program is loaded and run once.

    Raises:
        BundleError: The bundle has no golden data.
        EngineError: An output is not within tolerance; all are named with their difference.
    """
    wrong = describe(check_backend(bundle, backend))
    if wrong:
        raise EngineError(f"backend '{backend.name}' computes something else: {wrong}")


def examiner(bundle: Bundle) -> Callable[[Backend], Examine | None]:
    """What judges engines when they are loaded, for `Programs`.

    The reference backend's are not judged: the exporter has held it against PyTorch.

    Args:
        bundle: A bundle; golden data is needed once another backend loads something.
    """
    check = GoldenCheck(bundle)
    return lambda backend: None if backend.name == REFERENCE else check.require


def judge_for(bundle: Bundle) -> Callable[[Backend], Availability]:
    """What judges whole backends, for `select_backend`: every program is loaded and run once.

    Args:
        bundle: A bundle with golden data.
    """

    def judge(backend: Backend) -> Availability:
        try:
            require_golden(bundle, backend)
        except (BundleError, EngineError) as error:
            return Availability(False, str(error))
        return Availability(True, f"every program of {bundle.name} computes what PyTorch computed")

    return judge
