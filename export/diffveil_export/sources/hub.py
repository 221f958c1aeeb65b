"""Where the parts of a diffusers model lie: a folder, or a repository of the Hugging Face hub."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffveil.errors import OptionError

__all__ = ["Repository", "is_hub_id", "open_hub"]

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(text: str) -> bool:
    """Whether a source that is no path here reads like `owner/name`."""
    return bool(_ID.fullmatch(text)) and not Path(text).exists()


@dataclass(frozen=True)
class Repository:
    """A model in diffusers' layout.

    Attributes:
        source: Folder, or id on the hub: what `from_pretrained` takes.
        arguments: Further arguments of `from_pretrained`.
        commit: Commit of the hub's repository; empty for a folder.
    """

    source: str
    arguments: dict[str, Any]
    commit: str = ""

    def load(self, kind: Any, part: str, *, partly: bool = False, **options: Any) -> Any:
        """`kind.from_pretrained` for a subfolder, safetensors alone.

        Args:
            kind: Class of the network.
            part: Name of the subfolder; empty for the folder itself.
            partly: The file may hold more than this network, as CLIP's beside its vision tower.
            **options: For `from_pretrained`.

        Raises:
            OptionError: The part is missing, has no safetensors, or its tensors are not those of
                the network; all are named.
        """
        try:
            with warnings.catch_warnings():
                # diffusers and the hub library disagree about an argument of their own.
                warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
                network, info = kind.from_pretrained(
                    self.source,
                    subfolder=part,
                    use_safetensors=True,
                    output_loading_info=True,
                    **self.arguments,
                    **options,
                )
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise OptionError(
                f"'{self.source}': part '{part}' cannot be loaded: {first} (weights are read from "
                "safetensors only)"
            ) from error
        # Both libraries only warn, and leave such layers random.
        problems = [f"missing {name}" for name in sorted(info["missing_keys"])]
        problems += [f"{entry[0]} has another shape" for entry in sorted(info["mismatched_keys"])]
        extra = [n for n in sorted(info["unexpected_keys"]) if not n.endswith("position_ids")]
        problems += [] if partly else [f"unexpected {name}" for name in extra]
        if problems:
            raise OptionError(f"'{self.source}': part '{part}': " + "; ".join(problems))
        return network

    def file(self, name: str) -> Path | None:
        """A single file, such as `tokenizer/vocab.json`; None if there is none."""
        if not self.commit:
            path = Path(self.source) / name
            return path if path.is_file() else None
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(self.source, name, **self.arguments))
        except LocalEntryNotFoundError:
            cache, revision = self.arguments["cache_dir"], self.arguments["revision"]
            known = try_to_load_from_cache(self.source, name, cache_dir=cache, revision=revision)
            if known is not None:  # the cache remembers that the repository has none
                return None
            if self._complete():
                return None
            raise OptionError(
                f"'{self.source}': '{name}' is not in the cache, so it is unknown whether the "
                "repository has it: download the whole repository with `hf download`"
            ) from None
        except EntryNotFoundError:
            return None

    def _complete(self) -> bool:
        """Whether the cached snapshot looks like a whole download: it has the root's index."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(
            self.source,
            "model_index.json",
            cache_dir=self.arguments["cache_dir"],
            revision=self.arguments["revision"],
        )
        return isinstance(found, str)


def open_hub(name: str, *, revision: str | None = None, cache: Path | None = None) -> Repository:
    """Find a repository in the local cache, or on the hub.

    A cached copy is used without asking the hub, so that the same command gives the same bundle,
    with or without a network; name a revision to move on.

    Args:
        name: `owner/name`.
        revision: Branch, tag or commit; by default `main`.
        cache: Cache folder; by default the hub library's own (`HF_HOME`).

    Raises:
        OptionError: The repository is not cached and the hub cannot be reached, or has none such.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    arguments: dict[str, Any] = {"revision": revision, "cache_dir": cache}
    marker = "unet/config.json"
    local = True
    try:
        path = hf_hub_download(name, marker, local_files_only=True, **arguments)
    except LocalEntryNotFoundError:
        local = False
        try:
            path = hf_hub_download(name, marker, **arguments)
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
            at = f" at revision '{revision}'" if revision else ""
            raise OptionError(
                f"'{name}' is neither a folder or file here nor in the cache of the Hugging Face "
                f"hub{at}, and the hub did not give it ({type(error).__name__}): check the name, "
                "download it once with `hf download`, or give a local folder"
            ) from error
    commit = Path(path).parent.parent.name
    return Repository(name, {**arguments, "local_files_only": local, "revision": commit}, commit)
