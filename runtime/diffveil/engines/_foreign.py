"""What a native library raises, as the errors that callers and the fall-back know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffveil.errors import DiffveilError, EngineError

__all__ = ["foreign"]


@contextmanager
def foreign(what: str) -> Iterator[None]:
    """Turn any exception of a library into an `EngineError`; diffveil's own pass.

    Args:
        what: What was being done; the exception's own words follow.

    Raises:
        EngineError: The library raised.
    """
    try:
        yield
    except DiffveilError:
        raise
    except Exception as error:  # libraries' classes share no public base
        raise EngineError(f"{what}: {type(error).__name__}: {error}") from error
