"""Rebuilds the PyTorch networks of a reference-family bundle from the bundle itself.

A bundle's programs need its weights anyway, so the bundle does not carry them twice: an index,
`source.safetensors`, says where in `weights.bin` each parameter lies, and holds the small ones. The
oracle and the benchmarks thus run the very weights that ship, and training can go on from them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from diffveil.bundle import Bundle
from diffveil.errors import BundleError
from diffveil_export.blocks import BLOCK, pack, read_blocks, restore_blocks, unpack
from diffveil_export.components import Components
from diffveil_export.models.low_rank import low_rank_state
from diffveil_export.storage import DataFile, quantize

__all__ = ["SOURCE_FILE", "load_embedded", "write_source"]

SOURCE_FILE = "source.safetensors"
_SMALL = 1024  # elements; smaller tensors stand in the index itself
_DTYPES = {"int8": np.int8, "float16": np.float16, "float32": np.float32}


def write_source(
    folder: Path, components: Components, store: DataFile, few: DataFile | None = None
) -> None:
    """Write the index of a model's parameters; nothing if its networks state no configuration.

    Args:
        folder: Folder of the bundle.
        components: The model, its weights rounded as they are stored.
        store: The weights of all programs.
        few: The weights that only `denoise_few` has.
    """
    if not components.source:
        return
    places: dict[str, dict[str, Any]] = {}
    small: dict[str, torch.Tensor] = {}
    for name, value in _state(components):
        tensor = value.detach().cpu().contiguous()
        apart = few if name.startswith("few.") and few is not None else None
        place, scale = None, None
        if tensor.numel() >= _SMALL:
            place, scale = _place(tensor.numpy(), apart or store)
        if place is None:
            small[name] = tensor.clone()
            continue
        if apart is not None:
            place["data"] = apart.path.name
        places[name] = {**place, "shape": list(tensor.shape)}
        if scale is not None:
            small[f"{name}.scale"] = torch.from_numpy(scale)
    index = {"configurations": dict(components.source), "data": store.path.name, "places": places}
    raw = save(small, metadata={"index": json.dumps(index, sort_keys=True)})
    (folder / SOURCE_FILE).write_bytes(raw)


def load_embedded(bundle: Bundle) -> Components:
    """PyTorch networks of a bundle of the reference family.

    Args:
        bundle: A verified bundle.

    Raises:
        BundleError: The bundle carries no index of its parameters, or one that does not fit.
    """
    from diffusers import UNet2DConditionModel

    from diffveil_export.models.reference import apply_few, assemble
    from diffveil_export.reference.autoencoder import FaceAutoencoder, FaceDecoder
    from diffveil_export.reference.conditioner import Conditioner
    from diffveil_export.reference.recognizer import FaceRecognizer

    index, state = _read(bundle)
    configurations = index["configurations"]

    def build(kind: Any, part: str) -> Any:
        arguments = configurations[part].items()
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in arguments})

    unet_class: Any = UNet2DConditionModel
    parts: dict[str, nn.Module] = {
        "autoencoder": build(FaceAutoencoder, "autoencoder"),
        "unet": unet_class.from_config(configurations["unet"]),
        "conditioner": build(Conditioner, "conditioner"),
        "recognizer": build(FaceRecognizer, "recognizer").fuse(),
    }
    narrow = "guide_decoder"
    if narrow in configurations:
        parts[narrow] = build(FaceDecoder, narrow)
    for part, module in parts.items():
        prefix = f"{part}."
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        try:
            module.load_state_dict(own)
        except RuntimeError as error:
            raise BundleError(f"bundle '{bundle.name}': {SOURCE_FILE}: {error}") from error
    few = None
    if "few" in configurations:
        few = apply_few(parts["unet"], {k[4:]: v for k, v in state.items() if k[:4] == "few."})
    manifest = bundle.manifest
    components = assemble(
        name=bundle.name,
        few=few,
        licence=manifest.licence,
        thresholds=manifest.thresholds,
        provenance=manifest.provenance,
        **cast(Any, parts),
    )
    # As the programs know it: computed before the weights were rounded.
    return replace(components, unconditional=torch.from_numpy(bundle.unconditional.copy()))


def _state(components: Components) -> Iterator[tuple[str, torch.Tensor]]:
    modules = components.modules()
    parts = {
        "autoencoder": modules["autoencoder"],
        "unet": modules["unet"].get_submodule("unet"),
        "conditioner": modules["embedder"].get_submodule("conditioner"),
        "recognizer": modules["recognizer"],
    }
    if "guide_decoder" in components.source:
        parts["guide_decoder"] = modules["guide_decoder"]
    for part, module in parts.items():
        for name, tensor in module.state_dict().items():
            yield f"{part}.{name}", tensor
    if components.few is not None:
        for name, tensor in low_rank_state(modules["few"].get_submodule("unet")).items():
            yield f"few.{name}", tensor


def _place(
    weight: NDArray[np.float32], store: DataFile
) -> tuple[dict[str, Any] | None, NDArray[np.float32] | None]:
    """Where a weight lies in the file, as it is or transposed, and the scales it needs."""
    place = _place_blocks(weight, store)
    if place is not None:
        return place, None
    integers, scale = quantize(weight, 0)
    half = weight.astype(np.float16)
    forms: list[tuple[str, NDArray[Any]]] = [("int8", integers), ("float32", weight)]
    if np.array_equal(half.astype(np.float32), weight):
        forms.insert(1, ("float16", half))
    for kind, array in forms:
        for transposed in (False, True):
            if transposed and array.ndim != 2:
                continue
            raw = np.ascontiguousarray(array.T if transposed else array).tobytes()
            offset = store.find(raw)
            if offset is not None:
                place = {"kind": kind, "offset": offset, "transposed": transposed}
                return place, scale if kind == "int8" else None
    return None, None


def _place_blocks(weight: NDArray[np.float32], store: DataFile) -> dict[str, Any] | None:
    """Where a weight lies that is stored in blocks of four bits; None if it is not."""
    blocks = read_blocks(weight, 1) if weight.ndim > 1 else None
    if blocks is None:
        return None
    for transposed in (False, True) if weight.ndim == 2 else (False,):
        integers, scale = (np.ascontiguousarray(b.T if transposed else b) for b in blocks)
        offset, scales = store.find(pack(integers)), store.find(scale.tobytes())
        if offset is not None and scales is not None:
            return {"kind": "int4", "offset": offset, "scales": scales, "transposed": transposed}
    return None


def _read(bundle: Bundle) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    path = bundle.path / SOURCE_FILE
    if not path.is_file():
        raise BundleError(f"bundle '{bundle.name}' does not carry {SOURCE_FILE}")
    bundle.verify(full=True)
    with safe_open(path, framework="pt") as file:
        index = json.loads(file.metadata()["index"])
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    files = {index["data"], *(p["data"] for p in index["places"].values() if "data" in p)}
    maps = {file: np.memmap(bundle.path / file, np.uint8, "r") for file in files}
    for name, place in index["places"].items():
        shape = place["shape"][::-1] if place["transposed"] else place["shape"]
        data = maps[place.get("data", index["data"])]
        array = _int4(data, place, shape) if place["kind"] == "int4" else _whole(data, place, shape)
        array = array.T if place["transposed"] else array
        if place["kind"] == "int8":
            scale = state.pop(f"{name}.scale").numpy()
            array = array * scale.reshape(-1, *([1] * (array.ndim - 1)))
        state[name] = torch.from_numpy(np.ascontiguousarray(array))
    return index, state


def _whole(data: NDArray[np.uint8], place: dict[str, Any], shape: list[int]) -> NDArray[np.float32]:
    dtype = np.dtype(_DTYPES[place["kind"]])
    raw = data[place["offset"] :][: int(np.prod(shape)) * dtype.itemsize]
    return raw.view(dtype).reshape(shape).astype(np.float32)


def _int4(data: NDArray[np.uint8], place: dict[str, Any], shape: list[int]) -> NDArray[np.float32]:
    count, axis = int(np.prod(shape)), 0 if place["transposed"] else 1
    integers = unpack(data[place["offset"] :][: count // 2]).reshape(shape)
    scales = data[place["scales"] :][: 2 * count // BLOCK].view(np.float16)
    fewer = [n // BLOCK if i == axis else n for i, n in enumerate(shape)]
    return restore_blocks(integers, scales.reshape(fewer), axis)
