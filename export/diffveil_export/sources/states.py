"""Plain state dicts: tensors by name, nothing else."""

from __future__ import annotations

from pathlib import Path

import torch

from diffveil.errors import OptionError

__all__ = ["read_state"]


def read_state(file: Path) -> dict[str, torch.Tensor]:
    """Tensors by name from a safetensors file or a plain PyTorch state dict.

    Nothing in the file is executed: PyTorch files are read with `weights_only`.

    Raises:
        OptionError: The file is neither.
    """
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except SafetensorError as error:
            raise OptionError(f"'{file}' is not a safetensors file: {error}") from error
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # UnpicklingError is pickle's own class, and not the only one
        raise OptionError(
            f"'{file}' is not a plain state dict of tensors; convert it to safetensors"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise OptionError(f"'{file}' holds something else than tensors by name")
    return state
