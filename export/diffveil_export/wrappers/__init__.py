"""One module a program: what `torch.export` sees.

Each takes and returns exactly the tensors that `diffveil.programs` declares, in that order, and has
no control flow that depends on data.
"""

from __future__ import annotations

from torch import nn

from diffveil_export.components import Components
from diffveil_export.wrappers.decode import Decode
from diffveil_export.wrappers.denoise import Denoise
from diffveil_export.wrappers.embed import Embed
from diffveil_export.wrappers.encode import Encode
from diffveil_export.wrappers.expand import Expand
from diffveil_export.wrappers.guide import Guide
from diffveil_export.wrappers.parse import Parse
from diffveil_export.wrappers.recognize import Recognize

__all__ = [
    "Decode",
    "Denoise",
    "Embed",
    "Encode",
    "Expand",
    "Guide",
    "Parse",
    "Recognize",
    "wrap",
]


def wrap(components: Components, program: str) -> nn.Module:
    """The module of `program`; for `guide` the eager one, whose gradient autograd computes."""
    c = components
    modules: dict[str, nn.Module] = {
        "encode": Encode(c.autoencoder),
        "decode": Decode(c.autoencoder),
        "embed": Embed(c.embedder),
        "expand": Expand(c.expander),
        "denoise": Denoise(c.unet),
        "recognize": Recognize(c.recognizer),
        "guide": Guide(*c.guide_parts),
    }
    if c.parser is not None:
        modules["parse"] = Parse(c.parser)
    if c.few is not None:
        modules["denoise_few"] = Denoise(c.few)
    return modules[program].eval()
