"""Tells which family of recognizers a state dict belongs to, and fills a network with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from diffveil.errors import OptionError
from diffveil_export.models.irse50 import IRSE50
from diffveil_export.models.recognizers.inception_resnet import InceptionResnetV1
from diffveil_export.models.recognizers.iresnet import DEPTHS, IResNet
from diffveil_export.models.recognizers.mobilefacenet import MobileFaceNet

__all__ = ["FAMILIES", "Family", "network_from_state", "strip_prefix"]

Shapes = Mapping[str, tuple[int, ...]]

_PREFIXES = ("module.", "backbone.", "body.", "model.", "net.", "recognizer.")
_MOST_PROBLEMS = 40


def _irse50(shapes: Shapes) -> nn.Module:
    stages: list[tuple[int, int]] = []
    unit = 0
    while (name := f"body.{unit}.res_layer.1.weight") in shapes:
        width = shapes[name][0]
        if stages and stages[-1][0] == width:
            stages[-1] = (width, stages[-1][1] + 1)
        else:
            stages.append((width, 1))
        unit += 1
    return IRSE50(shapes["output_layer.3.weight"][0], tuple(stages))


@dataclass(frozen=True)
class Family:
    """A family of recognizers that share an architecture and names of tensors.

    Attributes:
        build: Network for shapes of tensors by name; raises KeyError or ValueError for others'.
        default: The family's usual network, to say what is missing.
        size: Side of the input in pixels.
        scale: Factor that the input needs beyond [-1, 1].
        ignored: Beginnings of names of tensors that embeddings do not need.
    """

    build: Callable[[Shapes], nn.Module]
    default: Callable[[], nn.Module]
    size: int = 112
    scale: float = 1.0
    ignored: tuple[str, ...] = ()


FAMILIES: Mapping[str, Family] = {
    "ir-se50": Family(_irse50, IRSE50),
    "iresnet": Family(IResNet.from_shapes, IResNet),
    "inception-resnet-v1": Family(
        InceptionResnetV1.from_shapes,
        InceptionResnetV1,
        size=160,
        scale=127.5 / 128,
        ignored=("logits.",),
    ),
    "mobilefacenet": Family(MobileFaceNet.from_shapes, MobileFaceNet),
}
"""Families by name."""


def strip_prefix(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remove what wrappers put before the names, where all names have it."""
    while state:
        found = [p for p in _PREFIXES if all(name.startswith(p) for name in state)]
        # IR-SE50's `body.` is a part of it, but never all of it.
        if not found:
            break
        state = {name[len(found[0]) :]: tensor for name, tensor in state.items()}
    return dict(state)


def network_from_state(
    state: Mapping[str, torch.Tensor], source: str
) -> tuple[nn.Module, str, Family]:
    """The network that `state` belongs to, filled, in float32, with its name and family.

    Args:
        state: Tensors by name.
        source: Where they come from, for messages.

    Raises:
        OptionError: No family has these tensors; says which are missing, unexpected or of another
            shape for the closest.
    """
    state = strip_prefix(state)
    tried: list[tuple[float, str, list[str]]] = []
    for name, family in FAMILIES.items():
        wanted = {n: t for n, t in state.items() if not n.startswith(family.ignored or ("\0",))}
        shapes = {n: tuple(t.shape) for n, t in wanted.items()}
        network = _build(family, shapes)
        expected = {n: tuple(t.shape) for n, t in network.state_dict().items()}
        problems = _problems(shapes, expected)
        if not problems:
            return _fill(network, wanted), _full_name(name, network), family
        here, there = set(shapes), {n for n in expected if not _is_counter(n)}
        tried.append((len(here & there) / max(1, len(here | there)), name, problems))
    share, closest, problems = max(tried, key=lambda t: t[0])
    families = ", ".join(f"{name} ({overlap:.0%} of the names)" for overlap, name, _ in tried)
    hint = f"{closest} is the closest: " if share else "none has a name in common; of the last, "
    rest = len(problems) - _MOST_PROBLEMS
    raise OptionError(
        f"'{source}' is of no known family of recognizers. Tried {families}. {hint}"
        + "; ".join(problems[:_MOST_PROBLEMS])
        + (f"; and {rest} more" if rest > 0 else "")
        + ". Any other recognizer can be given as an ONNX file"
    )


def _build(family: Family, shapes: Shapes) -> nn.Module:
    """A network without memory: as the shapes say or, where they say nothing, the usual one."""
    with torch.device("meta"):
        try:
            return family.build(shapes)
        except (IndexError, KeyError, ValueError, ZeroDivisionError, RuntimeError):
            return family.default()


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _problems(received: Shapes, expected: Shapes) -> list[str]:
    def names(of: Iterable[str]) -> list[str]:
        return sorted(n for n in of if not _is_counter(n))

    problems = [f"missing {n}" for n in names(expected.keys() - received.keys())]
    problems += [f"unexpected {n}" for n in names(received.keys() - expected.keys())]
    problems += [
        f"{n}: received {list(received[n])}, expected {list(expected[n])}"
        for n in names(received.keys() & expected.keys())
        if received[n] != expected[n]
    ]
    return problems


def _fill(network: nn.Module, state: Mapping[str, torch.Tensor]) -> nn.Module:
    filled = {
        name: torch.zeros((), dtype=torch.int64)
        if _is_counter(name)
        else state[name].detach().to(torch.float32)
        for name in network.state_dict()
    }
    network.load_state_dict(filled, assign=True)
    return network.eval().requires_grad_(False)


def _full_name(name: str, network: nn.Module) -> str:
    """The family's name, with the depth where it has a usual one."""
    if isinstance(network, IResNet):
        units = tuple(len(getattr(network, f"layer{i + 1}")) for i in range(network.stages))
        depth = [d for d, u in DEPTHS.items() if u == units]
        return f"{name}-{depth[0]}" if depth else name
    return name
