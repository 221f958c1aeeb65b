"""What the fuzzer has found so far still passes, and a short run without coverage finds nothing."""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent
CORPUS = sorted((FOLDER / "corpus").iterdir())


@pytest.fixture(scope="module")
def fuzzer() -> Iterator[ModuleType]:
    """The script and, beside it, its targets: modules of this folder, not of a package."""
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location("fuzz_keys", FOLDER / "fuzz_keys.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    while str(FOLDER) in sys.path:
        sys.path.remove(str(FOLDER))
    sys.modules.pop("targets", None)


@pytest.mark.parametrize("file", CORPUS, ids=lambda file: file.name)
def test_the_corpus_passes(fuzzer: ModuleType, file: Path) -> None:
    from targets import run_one

    accepted = run_one(file.read_bytes())
    # The seeds reach what they are meant to reach: but for two, they are sound.
    if file.name.partition("-")[0] in ("payload", "header", "file", "tensors", "identity"):
        assert accepted == (file.name not in ("file-diary", "tensors-dict"))


def test_a_few_mutations_pass(fuzzer: ModuleType) -> None:
    from targets import run_one

    rng = random.Random(20)
    accepted = [run_one(data) for data in islice(fuzzer.mutations(fuzzer.seeds(), rng), 1500)]
    assert 10 < sum(accepted) < 1000


def test_a_broken_target_is_noticed(
    fuzzer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import targets

    def broken(data: bytes) -> None:
        raise KeyError(data)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(targets, "TARGETS", (broken,))
    with pytest.raises(KeyError):
        fuzzer.by_mutation(5)
    (crash,) = tmp_path.iterdir()
    with pytest.raises(KeyError):
        targets.run_one(crash.read_bytes())
