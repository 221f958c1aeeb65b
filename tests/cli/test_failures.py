"""A result that cannot be written: reported, and the other photos are done all the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from diffveil import Protector, load_photo, save_photo
from diffveil.cli.main import main
from diffveil.keys import generate_identity
from fake_photos import ONE, ListedDetector, smooth_photo
from fake_programs import fake_programs


@pytest.fixture
def protector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Protector:
    """What the command line loads: programs of a few lines and a detector that knows the face."""
    made = Protector(fake_programs(tmp_path / "bundle"), detector=ListedDetector({(90, 110): ONE}))
    monkeypatch.setattr(Protector, "load", lambda *_, **__: made)
    return made


@pytest.fixture
def photos(tmp_path: Path, rng: np.random.Generator) -> Path:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png", "z.png"):
        save_photo(smooth_photo(rng, 90, 110), folder / name)
    return folder


def test_one_result_that_cannot_be_written_stops_no_other(
    protector: Protector, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipient, secret = generate_identity()
    identity = tmp_path / "me.agekey"
    identity.write_text(secret, encoding="ascii")
    out, keys, back = tmp_path / "out", tmp_path / "keys", tmp_path / "back"
    out.mkdir()
    (out / "sub").write_bytes(b"a file where a folder should be")
    # Not status 5: no photo and no key is broken.
    arguments = ["anonymize", str(photos), "-o", str(out), "--key", str(keys), "--json"]
    assert main([*arguments, "--recipient", recipient]) == 1
    told = capsys.readouterr()
    a, b, z = (json.loads(line) for line in told.out.splitlines())
    assert b["output"] is None
    assert b["error"]["kind"] == "WriteError"
    assert str(photos / "sub" / "b.png") in told.err
    for report in (a, z):
        assert "error" not in report
        assert load_photo(report["output"]).width == 110

    back.mkdir()
    (back / "a.png").mkdir()
    opening = ["--key", str(keys), "--identity", str(identity), "-o", str(back)]
    assert main(["recover", str(out), *opening]) == 2  # found out before anything is opened
    (back / "a.png").rmdir()
    (back / "z.png").write_bytes(b"")
    capsys.readouterr()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffveil.photos.os.replace", fail)
        assert main(["recover", str(out), *opening]) == 1
    assert capsys.readouterr().err.count("No space left on device") == 2
    assert [path.name for path in back.iterdir()] == ["z.png"]
    assert (back / "z.png").read_bytes() == b""
    assert main(["recover", str(out), *opening]) == 0
