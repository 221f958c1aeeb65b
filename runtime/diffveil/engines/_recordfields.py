"""Takes typed fields out of the JSON of an engine record and collects what is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["RecordReader"]

_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_TEXT = 128
_MAX_FIELDS = 64
_MAX_ENGINES = 64
_MAX_RANK = 8
_MAX_INTEGER = 1 << 48


class RecordReader:
    """Every method returns a value of the promised type, and notes a problem where it had none.

    Attributes:
        problems: What was wrong, by the field's path.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []

    def wrong(self, path: str, expected: str) -> None:
        """Note that the field at `path` is not what was expected."""
        self.problems.append(f"{path}: expected {expected}")

    def object(self, value: Any, path: str, known: tuple[str, ...]) -> dict[str, Any]:
        """An object with exactly the fields `known`."""
        if not isinstance(value, dict):
            self.wrong(path, "an object")
            return {}
        self.problems += [f"{path}.{str(k)[:64]}: unknown field" for k in value if k not in known]
        self.problems += [f"{path}.{k}: missing" for k in known if k not in value]
        return value

    def rows(self, content: Mapping[str, Any]) -> list[Any]:
        """The array `engines`."""
        rows = content.get("engines")
        if not isinstance(rows, list) or len(rows) > _MAX_ENGINES:
            self.wrong("engines", f"an array of at most {_MAX_ENGINES} elements")
            return []
        return rows

    def mapping(self, value: Any, path: str) -> dict[str, Any]:
        """An object with any fields, but not too many."""
        if not isinstance(value, dict) or len(value) > _MAX_FIELDS:
            self.wrong(path, f"an object of at most {_MAX_FIELDS} fields")
            return {}
        return value

    def text(self, value: Any, path: str) -> str:
        """A short text."""
        if not isinstance(value, str) or not 0 < len(value) <= _MAX_TEXT:
            self.wrong(path, f"text of 1…{_MAX_TEXT} characters")
            return ""
        return value

    def sha256(self, value: Any, path: str) -> str:
        """A SHA-256 in hex."""
        if not isinstance(value, str) or not _SHA256.fullmatch(value):
            self.wrong(path, "64 hexadecimal digits")
            return ""
        return value

    def integer(self, value: Any, path: str) -> int:
        """A positive integer."""
        if type(value) is not int or not 1 <= value <= _MAX_INTEGER:
            self.wrong(path, f"an integer in 1…{_MAX_INTEGER}")
            return 1
        return value

    def number(self, value: Any, path: str) -> float:
        """A finite number that is not negative."""
        if type(value) not in (int, float) or not 0 <= value <= _MAX_INTEGER:
            self.wrong(path, "a number that is not negative")
            return 0.0
        return float(value)

    def dtypes(self, value: Any, path: str) -> dict[str, str]:
        """Names of dtypes by tensor."""
        return {k: self.text(v, f"{path}.{k}") for k, v in self.mapping(value, path).items()}

    def flags(self, value: Any, path: str) -> dict[str, bool | int | str | None]:
        """Booleans, integers, texts and nulls by name."""
        flags = self.mapping(value, path)
        for name, flag in flags.items():
            if flag is not None and not isinstance(flag, bool | int | str):
                self.wrong(f"{path}.{name}", "a boolean, an integer, text or null")
        return flags

    def shapes(self, value: Any, path: str) -> list[tuple[int, ...]]:
        """The shapes min, opt and max: of one rank, not decreasing."""
        fields = self.object(value, path, ("min", "opt", "max"))
        shapes = [self._shape(fields.get(n), f"{path}.{n}") for n in ("min", "opt", "max")]
        ranks = {len(shape) for shape in shapes}
        ordered = all(a <= b <= c for a, b, c in zip(*shapes, strict=False))
        if len(ranks) != 1 or not ordered:
            self.wrong(path, "shapes of one rank with min ≤ opt ≤ max")
        return shapes

    def _shape(self, value: Any, path: str) -> tuple[int, ...]:
        if not isinstance(value, list) or not 1 <= len(value) <= _MAX_RANK:
            self.wrong(path, f"an array of 1…{_MAX_RANK} integers")
            return (1,)
        return tuple(self.integer(size, f"{path}[{i}]") for i, size in enumerate(value))
