"""The public surface is a decision: what is exported is listed, documented and has one home."""

from __future__ import annotations

import inspect
import types

import pytest

import diffveil
from diffveil import errors


def test_everything_exported_is_listed_and_nothing_else() -> None:
    names = {
        name
        for name, value in vars(diffveil).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert names - {"annotations"} == set(diffveil.__all__) - {"__version__"}
    assert sorted(diffveil.__all__) == sorted(set(diffveil.__all__))


def test_all_errors_are_exported() -> None:
    assert set(errors.__all__) <= set(diffveil.__all__)
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), errors.DiffveilError)


@pytest.mark.parametrize("name", sorted(set(diffveil.__all__) - {"PRESETS", "__version__"}))
def test_exports_are_documented(name: str) -> None:
    value = getattr(diffveil, name)
    assert inspect.getdoc(value)
    for attribute, member in inspect.getmembers(value) if inspect.isclass(value) else ():
        if not attribute.startswith("_") and callable(member):
            assert inspect.getdoc(getattr(value, attribute)), f"{name}.{attribute}"


def test_the_verbs_take_what_the_readme_promises() -> None:
    for verb in ("anonymize", "hide"):
        parameters = inspect.signature(getattr(diffveil.Protector, verb)).parameters
        keywords = [p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY]
        assert keywords == [
            "variants",
            "preset",
            "steps",
            "strength",
            "seed",
            "faces",
            "aligned",
            "on_missing",
            "make_key",
            "progress",
            *(["carry", "secret", "pseudonym", "people"] if verb == "anonymize" else []),
        ]
        assert parameters["on_missing"].default == "error"
    assert list(inspect.signature(diffveil.Protector.load).parameters) == [
        "bundle",
        "backend",
        "detector",
        "threads",
        "verify",
        "max_memory",
    ]
    assert list(inspect.signature(diffveil.Protector.recover).parameters)[:3] == [
        "self",
        "photo",
        "key",
    ]
