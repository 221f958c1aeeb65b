"""Device kernels of diffveil, each with a NumPy or PyTorch reference of the same signature.

Nothing of diffveil is imported here: the runtime may import kernels, late and optionally, and
never the other way round.
"""

from __future__ import annotations

__all__: list[str] = []
