"""Finds MSI weights in the files that they are published in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from diffveil.errors import OptionError
from diffveil_export.sources.pickles import read_pickled_tensors
from diffveil_export.sources.states import read_state

__all__ = ["read_msi"]

_MARK = "t_embed1.weight"  # a name that no other network has


def read_msi(file: Path) -> dict[str, torch.Tensor]:
    """MSI weights by the names that `diffveil_export.models.msi` uses.

    Args:
        file: Safetensors, a plain state dict, or the research release's `embeddings.pt`, which
            pickles `{"string_to_token": …, "attention": module}`. Names may have a prefix.

    Raises:
        OptionError: The file cannot be read, or has no MSI weights, or several.
    """
    state: Mapping[str, torch.Tensor]
    if file.suffix == ".safetensors":
        state = read_state(file)
    else:
        state = read_pickled_tensors(file)
    prefixes = [n.removesuffix(_MARK) for n in state if n == _MARK or n.endswith(f".{_MARK}")]
    if len(prefixes) != 1:
        raise OptionError(
            f"'{file}' holds {len(prefixes)} tensors named '{_MARK}', expected one: it is no file "
            f"of MSI weights. It holds {', '.join(list(state)[:10]) or 'no tensors'}"
        )
    prefix = prefixes[0]
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
