from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffveil import Protector
from diffveil.cli.exits import ExitCode
from diffveil.cli.main import main
from fake_photos import ONE, ListedDetector, smooth_photo
from fake_programs import fake_programs


@pytest.fixture
def folder(tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two photos and a secret, and a protector of fakes behind the command line."""
    for name in ("a", "b"):
        Image.fromarray(smooth_photo(rng, 90, 110)).save(tmp_path / f"{name}.png")
    (tmp_path / "secret.txt").write_text("seven small green lamps\n")
    programs = fake_programs(tmp_path / "bundle")
    protector = Protector(programs, detector=ListedDetector({(90, 110): ONE}))
    monkeypatch.setattr(Protector, "load", lambda *_, **__: protector)
    monkeypatch.setattr("diffveil.secretkeys._COST", 2**4)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_carried_and_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = ("--passphrase-file", "secret.txt")
    assert main(["anonymize", "a.png", "--carry", *secret]) == ExitCode.DONE
    assert "carried by the photo itself" in capsys.readouterr().out
    assert main(["recover", "a-anonymized.png", "--carry", *secret]) == ExitCode.DONE
    assert (folder / "a-anonymized-recovered.png").is_file()
    (folder / "other.txt").write_text("eight small green lamps\n")
    wrong = ("--passphrase-file", "other.txt", "-o", "wrong.png")
    assert main(["recover", "a-anonymized.png", "--carry", *wrong]) == ExitCode.DONE
    shown = capsys.readouterr()
    assert "lamps" not in shown.out + shown.err


@pytest.mark.parametrize("people", [(), ("--people", "team")])
def test_pseudonyms(folder: Path, people: tuple[str, ...]) -> None:
    (folder / "team" / "bo").mkdir(parents=True)
    (folder / "team" / "ada.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "team" / "bo" / "1.png").write_bytes((folder / "b.png").read_bytes())
    command = ["anonymize", "a.png", "b.png", "--pseudonym", "secret.txt", *people]
    assert main([*command, "-o", "one"]) == main([*command, "-o", "two"]) == ExitCode.DONE
    for name in ("a", "b"):
        one, two = (
            np.asarray(Image.open(next((folder / o).glob(f"{name}*")))) for o in ("one", "two")
        )
        np.testing.assert_array_equal(one, two)
        assert (one != np.asarray(Image.open(folder / f"{name}.png"))).any()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--carry", "--key", "k"], "makes no key file"),
        (["--carry", "--seed", "3", "--passphrase-file", "secret.txt"], "do not go with"),
        (["--pseudonym", "missing.txt"], "no such file"),
        (["--pseudonym", "secret.txt", "--variants", "2"], "do not go with"),
        (["--pseudonym", "secret.txt", "--people", "nowhere"], "no such folder"),
        (["--people", "team"], "add --pseudonym"),
    ],
)
def test_what_cannot_be_meant(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], reason: str
) -> None:
    assert main(["anonymize", "a.png", *options]) == ExitCode.USAGE
    assert reason in capsys.readouterr().err
    assert not list(folder.glob("*-anonymized*"))


def test_recovery_is_by_key_or_by_the_photo() -> None:
    for options in ([], ["--carry", "--key", "k"]):
        with pytest.raises(SystemExit) as caught:
            main(["recover", "a.png", *options])
        assert caught.value.code == ExitCode.USAGE
