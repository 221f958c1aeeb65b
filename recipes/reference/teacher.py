"""The teacher: a recognizer that exists as TorchScript only, and what it sees on its way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

FRAME = slice(8, 120)  # ArcFace's 112×112 framing in a crop of 128 pixels
_SUMS = ("aten::add", "aten::add_")


class Teacher:
    """A frozen recognizer of aligned 112-pixel faces, RGB 0 … 255, traced into one graph.

    Its features are the last sum of a residual block at each resolution. A network that goes on to
    look at the mirrored face is asked for what it sees first.

    Args:
        file: TorchScript.
        device: Where it runs.

    Raises:
        SystemExit: The file holds no graph with residual blocks.
    """

    def __init__(self, file: Path, device: str = "cpu") -> None:
        self._file = file
        self._network: Any = torch.jit.load(file, map_location=device).eval()  # type: ignore[no-untyped-call]
        sums = list(self._sums(device))
        if not sums:
            raise SystemExit(f"{file}: no residual blocks in its graph: trace and freeze it")
        self._features = self._ending_in([place for place, _ in sums])
        self.shapes = [shape for _, shape in sums]  # (channels, side) of every feature map

    def look(self, image: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Feature maps, each [B, C, s, s], and unit embeddings [B, E].

        Args:
            image: Crops [B, 3, 128, 128] in [-1, 1].
        """
        *features, embedding = self._features(self._framed(image))
        return features, F.normalize(embedding.float(), dim=1)

    def features(self, image: torch.Tensor) -> list[torch.Tensor]:
        """The feature maps alone."""
        return self.look(image)[0]

    def embed(self, image: torch.Tensor) -> torch.Tensor:
        """The embeddings alone."""
        return self.look(image)[1]

    @staticmethod
    def _framed(image: torch.Tensor) -> torch.Tensor:
        return 127.5 * (image[:, :, FRAME, FRAME] + 1)

    def _sums(self, device: str) -> Iterator[tuple[int, tuple[int, int]]]:
        """Place in the graph, channels and side of the last sum at each resolution."""
        places = [i for i, n in enumerate(self._network.graph.nodes()) if n.kind() in _SUMS]
        everything = self._ending_in(places)
        with torch.no_grad():
            maps = everything(torch.zeros(1, 3, 112, 112, device=device))
        last: tuple[int, tuple[int, int]] | None = None
        for place, found in zip(places, maps, strict=False):  # the embedding comes last
            if found.ndim != 4 or (last and found.shape[-1] > last[1][1]):
                break
            shape = (found.shape[1], found.shape[-1])
            if last and shape != last[1]:
                yield last
            last = place, shape
        if last:
            yield last

    def _ending_in(self, places: list[int]) -> Any:
        """A function of the network's input: outputs of nodes of its graph, and its own output."""
        graph = self._network.graph.copy()
        if next(graph.inputs()).uses():  # the module itself: frozen, it has no attributes
            raise SystemExit(f"{self._file}: its graph reads attributes: freeze it")
        nodes = list(graph.nodes())
        outputs = [*(nodes[place].output() for place in places), next(graph.outputs())]
        graph.eraseOutput(0)
        both = graph.create("prim::TupleConstruct", outputs, 1)
        graph.appendNode(both)
        both.output().setType(torch._C.TupleType([output.type() for output in outputs]))
        graph.registerOutput(both.output())
        graph.eraseInput(0)
        torch._C._jit_pass_dce(graph)
        return torch._C._create_function_from_graph("features", graph)
