"""All programs of a bundle on one backend, each loaded when it is first called."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from types import TracebackType
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from diffveil.bundle import Bundle
from diffveil.engines._base import Array, Backend, Engine
from diffveil.engines._budget import MemoryBudget
from diffveil.engines._loop import STEP_CARRY, Carry, JoiningEngine, Loop, WholeLoop, loop_of
from diffveil.engines._pool import EnginePool, Examine
from diffveil.errors import EngineError

__all__ = ["Programs"]

_F32 = NDArray[np.float32]
_T = TypeVar("_T")


class Programs:
    """Calls a bundle's programs by name. Safe to share between threads.

    Args:
        bundle: The bundle.
        backend: What executes its programs.
        others: What executes them when that fails, best first; see `EnginePool`.
        examine: Gives what judges the engines of a backend when they are loaded, or None.
        why: Why that backend was chosen, in words.
        budget: Memory to keep within.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        *,
        others: Sequence[Backend] = (),
        examine: Callable[[Backend], Examine | None] | None = None,
        why: str = "it was named",
        budget: MemoryBudget | None = None,
    ) -> None:
        self.bundle = bundle
        self._examine, self._budget = examine, budget
        self._pool = EnginePool(bundle, (backend, *others), examine=examine, why=why, budget=budget)

    @property
    def backend(self) -> Backend:
        """What executes the programs now."""
        return self._pool.backend

    @property
    def why(self) -> str:
        """Why it is that backend, in words."""
        return self._pool.why

    def __enter__(self) -> Programs:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def engine(self, program: str) -> Engine:
        """The engine of `program`, loaded if it is not yet.

        Raises:
            EngineError: The backend cannot load it, or this object is closed.
            BundleCorruptError: A file of the program differs from its hash.
        """
        return self._pool.engine(program)

    @property
    def max_batch(self) -> int | None:
        """Most rows of one call that backend and memory allow; None where neither says."""
        limits = [] if self._budget is None else [self._budget.rows]
        ask = getattr(self.backend, "max_batch", None)
        with suppress(EngineError):  # loading will say what is wrong, or fall back
            limits += [] if ask is None else [int(ask(self.bundle))]
        return min(limits, default=None)

    @property
    def takes_loops(self) -> bool:
        """Whether the backend gains by loops that are handed over whole; see `whole_loop`."""
        return bool(getattr(self.backend, "takes_loops", False))

    def preferring(self, name: str, why: str) -> Programs | None:
        """The same programs on another of the backends, with the others to fall back on.

        Args:
            name: The backend that is wanted.
            why: Why, in words.

        Returns:
            Programs with engines of their own; None where this is not one of the backends or has
            failed, where these are closed, and where memory is limited: it would be needed twice.
        """
        remaining = self._pool.remaining
        first = [b for b in remaining if b.name == name]
        if not first or self._pool.closed or self._budget is not None:
            return None
        others = [b for b in remaining if b.name != name]
        return Programs(
            self.bundle,
            first[0],
            others=others,
            examine=self._examine,
            why=why,
        )

    def held(self, programs: Iterable[str]) -> AbstractContextManager[None]:
        """Keep programs loaded while a block runs, as loops over them need it.

        Where memory is limited, calls of other threads would otherwise unload them in between.

        Args:
            programs: Names; those that the bundle lacks are left out.

        Raises:
            EngineError: On entry: the backend cannot load one, or this object is closed.
        """
        return self._pool.held([name for name in programs if self.can(name)])

    def attempt(self, work: Callable[[], _T]) -> _T:
        """Do work on loops or engines; again from its start when a backend fails.

        Raises:
            EngineError: It failed on the last backend.
        """
        return self._pool.attempt(work)

    def preload(self, programs: Iterable[str]) -> None:
        """Load engines now rather than at their first call."""
        for program in programs:
            self.engine(program)

    def close(self) -> None:
        """Free all engines; later calls raise `EngineError`."""
        self._pool.close()

    def encode(self, *, image: Array) -> _F32:
        """Scaled latent mean [B, C, s, s] of images [B, 3, S, S] in [-1, 1]."""
        return self._only("latent", self._pool.call("encode", image=image))

    def decode(self, *, latent: Array) -> _F32:
        """Images [B, 3, S, S], about [-1, 1] and not clipped, of latents [B, C, s, s]."""
        return self._only("image", self._pool.call("decode", latent=latent))

    def embed(self, *, image: Array) -> _F32:
        """Stage tokens [B, 10, D] of images [B, 3, S, S] in [-1, 1]."""
        return self._only("tokens", self._pool.call("embed", image=image))

    def expand(self, *, tokens: Array) -> _F32:
        """Conditioning [N, T, W] of tokens [N, D]."""
        return self._only("conditioning", self._pool.call("expand", tokens=tokens))

    def denoise(self, *, latent: Array, timestep: Array, conditioning: Array) -> _F32:
        """Noise [B, C, s, s] predicted in latents [B, C, s, s].

        Args:
            latent: Noisy latents [B, C, s, s], float32.
            timestep: Diffusion timestep of each, [B], int64, in 0…999.
            conditioning: [B, T, W], float32.
        """
        return self._denoise("denoise", latent, timestep, conditioning)

    def denoise_few(self, *, latent: Array, timestep: Array, conditioning: Array) -> _F32:
        """What `denoise` predicts, by the model distilled for few steps.

        Arguments and result are those of `denoise`.

        Raises:
            BundleError: The bundle has no program `denoise_few`; see `can`.
        """
        return self._denoise("denoise_few", latent, timestep, conditioning)

    def recognize(self, *, image: Array) -> _F32:
        """Unit identity embeddings [B, E] of images [B, 3, S, S] in [-1, 1]."""
        return self._only("embedding", self._pool.call("recognize", image=image))

    def parse(self, *, image: Array) -> _F32:
        """Probability [B, 1, S, S] that pixels of images [B, 3, S, S] in [-1, 1] are the face's.

        Raises:
            BundleError: The bundle has no program `parse`; see `can`.
        """
        return self._only("face", self._pool.call("parse", image=image))

    def assess(self, *, image: Array) -> _F32:
        """Naturalness [B], 0 … 1, of the faces in images [B, 3, S, S] in [-1, 1].

        The grade that people's eyes would give, as far as a network learned it: 0 for a face that
        is smeared or half drawn, 1 for one that passes as a photograph's.

        Raises:
            BundleError: The bundle has no program `assess`; see `can`.
        """
        return self._only("naturalness", self._pool.call("assess", image=image))

    def can(self, program: str) -> bool:
        """Whether the bundle has an optional program."""
        return program in self.bundle.manifest.programs

    def guide(
        self, *, x0: Array, anchor: Array, repel: Array, attract: Array, sibling: Array
    ) -> tuple[_F32, _F32, _F32]:
        """Identity energy of predicted clean latents, and its gradient.

        E = Σ_b repel_b·max(cos(e_b, a_b), 0) + attract_b·(1 − cos(e_b, a_b))
            + Σ_{i<j} sibling_ij·max(cos(e_i, e_j), 0), with e the embedding of the decoded x0.

        Args:
            x0: Predicted clean latents [B, C, s, s], float32.
            anchor: Embeddings [B, E] to leave or to approach, float32, unit length.
            repel: Weight of leaving the anchor, [B], float32.
            attract: Weight of approaching the anchor, [B], float32.
            sibling: Weights [B, B] of pairs i < j that must differ, float32; rest is ignored.

        Returns:
            gradient [B, C, s, s] of E by x0; energy [B], each face's share of E (a pair's term
            counts for its first member); embedding [B, E] of the decoded faces.
        """
        return self._guide("guide", x0, anchor, repel, attract, sibling)

    def guide_latent(
        self, *, x0: Array, anchor: Array, repel: Array, attract: Array, sibling: Array
    ) -> tuple[_F32, _F32, _F32]:
        """What `guide` computes, at a fraction of its cost: its embedding is an estimate.

        Arguments and results are those of `guide`.

        Raises:
            BundleError: The bundle has no program `guide_latent`; see `can`.
        """
        return self._guide("guide_latent", x0, anchor, repel, attract, sibling)

    def step_loop(self, rows: int) -> Loop:
        """A loop of program `step` over that many rows B; see `can`.

        A call denoises, asks for the identity gradient and makes one step of a sampler:

            ε  = denoise(latent, timestep, conditioning)
            gradient, embedding = guide(x0_x·latent + x0_eps·ε, anchor, repel, attract, sibling)
            x  = a0·latent + a1·previous + b0·ε + b1·previous_epsilon + n·noise − g·gradient
            next = background + mask·(x − background)

        Latent, previous [B, C, s, s] and previous_epsilon carry over from call to call; what else
        it takes is put: timestep [B] int64, conditioning [B, T, W], coefficients [B, 8] (order of
        `diffveil.samplers.table.COEFFICIENTS`), noise [B, C, s, s], background like it and mask
        [B, 1, s, s] (zeros and ones: no background), what `guide` takes, and

        * normalise [B]: above 0, the row's gradient is divided by its root mean square; one that
          vanishes becomes zero;
        * release [B]: rows whose embedding has come this far are not pushed: cos(e, anchor) where
          attract is above repel, −cos(e, anchor) elsewhere, is at least this, and no sibling of
          theirs has a cosine above 0 with them. 2: every row is pushed.

        It returns next, epsilon, embedding [B, E] and pushed [B], 1 where the row was not released.

        Loops want the program to be `held` for as long as they run.

        Raises:
            BundleError: The bundle has no program `step`.
        """
        return loop_of(self.engine("step"), rows, STEP_CARRY)

    def whole_loop(
        self, programs: Sequence[str], rows: int, carries: Mapping[str, Carry]
    ) -> WholeLoop | None:
        """A loop over several programs whose calls the backend takes all at once.

        The programs are to be `held` until it is closed.

        Args:
            programs: Names, at least one.
            rows: Rows B of every call.
            carries: How the outputs of each program become inputs.

        Returns:
            The loop, to be closed; None where the bundle lacks a program, or where the backend
            gains nothing by it: then call program by program.

        Raises:
            EngineError: An engine cannot be loaded, or does not take so many rows.
        """
        if not all(self.can(name) for name in programs):
            return None
        first, *others = [self.engine(name) for name in programs]
        return first.join(others, rows, carries) if isinstance(first, JoiningEngine) else None

    def _denoise(self, program: str, latent: Array, timestep: Array, conditioning: Array) -> _F32:
        outputs = self._pool.call(
            program, latent=latent, timestep=timestep, conditioning=conditioning
        )
        return self._only("epsilon", outputs)

    def _guide(
        self, program: str, x0: Array, anchor: Array, repel: Array, attract: Array, sibling: Array
    ) -> tuple[_F32, _F32, _F32]:
        outputs = self._pool.call(
            program, x0=x0, anchor=anchor, repel=repel, attract=attract, sibling=sibling
        )
        return (
            self._only("gradient", outputs),
            self._only("energy", outputs),
            self._only("embedding", outputs),
        )

    @staticmethod
    def _only(name: str, outputs: dict[str, Array]) -> _F32:
        return cast(_F32, outputs[name])
