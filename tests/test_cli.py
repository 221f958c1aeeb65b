"""The command line as scripts meet it: subprocesses, files, exit codes and JSON lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffveil.cli.main import main

FIELDS = {"input", "output", "key", "backend", "seconds", "faces"}
PASSPHRASE = "four entirely random words"
SIDE = 320  # pixels of the test photo


def diffveil(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the command as a script would: no terminal, nothing on standard input."""
    return subprocess.run(
        [sys.executable, "-m", "diffveil", *map(str, arguments)],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )


def lines(finished: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in finished.stdout.splitlines()]


def pixels(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture(scope="session")
def portrait() -> Image.Image:
    """The astronaut, small. `make test` installs what carries it, without its dependencies."""
    spec = find_spec("skimage")
    assert spec is not None, "pip install --no-deps scikit-image"
    assert spec.submodule_search_locations is not None
    with Image.open(Path(spec.submodule_search_locations[0]) / "data" / "astronaut.png") as image:
        return image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class Round:
    """One photo that went through anonymize, with what is needed to recover it."""

    folder: Path
    photo: Path
    protected: Path
    key: Path
    identity: Path
    report: dict[str, Any]


@pytest.fixture(scope="module")
def done(
    tmp_path_factory: pytest.TempPathFactory, portrait: Image.Image, tiny_bundle_path: Path
) -> Round:
    from diffveil.keys import generate_identity

    folder = tmp_path_factory.mktemp("cli")
    photo, identity = folder / "photo.png", folder / "me.agekey"
    exif = Image.Exif()
    exif[0x010F] = "a camera that tells"
    portrait.save(photo, exif=exif)
    recipient, secret = generate_identity()
    identity.write_text(secret + "\n", encoding="ascii")
    key = folder / "photo.veilkey"
    finished = diffveil(
        *("anonymize", photo, "--key", key, "--recipient", recipient, "--seed", 1, "--steps", 2),
        *("--bundle", tiny_bundle_path, "--json"),
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    (report,) = lines(finished)
    return Round(folder, photo, folder / "photo-anonymized.png", key, identity, report)


def test_the_json_line_has_the_promised_fields(done: Round) -> None:
    report = done.report
    assert set(report) == FIELDS
    assert report["input"] == str(done.photo)
    assert report["output"] == str(done.protected)
    assert report["key"] == str(done.key)
    assert report["backend"] == "cpu"
    assert report["seconds"] > 0
    (face,) = report["faces"]
    assert set(face) == {"box", "landmarks", "score"}
    x0, y0, x1, y1 = face["box"]
    assert 0 < x0 < x1 < SIDE
    assert 0 < y0 < y1 < SIDE
    assert np.shape(face["landmarks"]) == (5, 2)
    assert 0.5 < face["score"] <= 1


def test_the_face_changed_and_nothing_else(done: Round) -> None:
    before, after = pixels(done.photo), pixels(done.protected)
    assert after.shape == before.shape
    x0, y0, x1, y1 = (round(value) for value in done.report["faces"][0]["box"])
    assert np.any(before[y0:y1, x0:x1] != after[y0:y1, x0:x1])
    width, height = x1 - x0, y1 - y0
    far = np.ones(before.shape[:2], bool)
    far[max(0, y0 - height) : y1 + height, max(0, x0 - width) : x1 + width] = False
    assert far.any()
    assert np.array_equal(before[far], after[far])


def test_the_protected_photo_carries_no_metadata(done: Round) -> None:
    assert b"a camera that tells" in done.photo.read_bytes()
    assert b"a camera that tells" not in done.protected.read_bytes()


def test_the_key_file_is_its_owners_only(done: Round) -> None:
    assert done.key.read_bytes().startswith(b"age-encryption.org/v1\n")
    if os.name == "posix":
        assert done.key.stat().st_mode & 0o777 == 0o600


def test_recover_gives_what_the_library_gives(
    done: Round, tiny_bundle_path: Path, tmp_path: Path
) -> None:
    from diffveil.keys import RecoveryKey
    from diffveil.protector import Protector

    output = tmp_path / "back.png"
    finished = diffveil(
        *("recover", done.protected, "--key", done.key, "--identity", done.identity),
        *("-o", output, "--bundle", tiny_bundle_path, "--json"),
    )
    assert finished.returncode == 0, finished.stderr
    (report,) = lines(finished)
    assert set(report) == FIELDS
    assert report["output"] == str(output)
    assert report["faces"][0]["box"] == done.report["faces"][0]["box"]
    key = RecoveryKey.unseal(done.key, identity=done.identity)
    with Protector.load(tiny_bundle_path) as protector:
        expected = protector.recover(done.protected, key).image
    assert np.array_equal(pixels(output), np.asarray(expected.convert("RGB")))


def test_the_same_seed_gives_the_same_photo_and_variants_differ(
    done: Round, tiny_bundle_path: Path, tmp_path: Path
) -> None:
    finished = diffveil(
        *("anonymize", done.photo, "-o", tmp_path / "x.png", "--variants", 2, "--seed", 1),
        *("--steps", 2, "--bundle", tiny_bundle_path, "--json"),
    )
    assert finished.returncode == 0, finished.stderr
    (report,) = lines(finished)
    assert report["outputs"] == [str(tmp_path / "x-1.png"), str(tmp_path / "x-2.png")]
    assert report["key"] is None
    one, two = pixels(tmp_path / "x-1.png"), pixels(tmp_path / "x-2.png")
    assert not np.array_equal(one, two)
    again = diffveil(
        *("anonymize", done.photo, "-o", tmp_path / "y.png", "--seed", 1, "--steps", 2),
        *("--bundle", tiny_bundle_path),
    )
    assert "recovery key discarded" in again.stdout
    assert np.array_equal(pixels(tmp_path / "y.png"), pixels(done.protected))


def test_a_wrong_identity_is_status_4_and_writes_nothing(
    done: Round, tiny_bundle_path: Path, tmp_path: Path
) -> None:
    from diffveil.keys import generate_identity

    stranger = tmp_path / "stranger.agekey"
    stranger.write_text(generate_identity()[1], encoding="ascii")
    finished = diffveil(
        *("recover", done.protected, "--key", done.key, "--identity", stranger),
        *("-o", tmp_path / "back.png", "--bundle", tiny_bundle_path, "--json"),
    )
    assert finished.returncode == 4
    assert not (tmp_path / "back.png").exists()
    (report,) = lines(finished)
    assert set(report) == FIELDS | {"error"}
    assert report["output"] is None
    assert report["error"]["kind"] == "WrongSecretError"
    assert str(done.key) in finished.stderr


def test_a_passphrase_from_a_file_opens_and_a_wrong_one_is_status_4(
    done: Round, tiny_bundle_path: Path, tmp_path: Path
) -> None:
    right, wrong = tmp_path / "right.txt", tmp_path / "wrong.txt"
    right.write_text(PASSPHRASE + "\n", encoding="utf-8")
    wrong.write_text("four other random words\n", encoding="utf-8")
    machine = ("--bundle", tiny_bundle_path)
    key, protected = tmp_path / "p.veilkey", tmp_path / "p.jpg"
    sealed = diffveil(
        *("hide", done.photo, "-o", protected, "--key", key, "--passphrase-file", right),
        *("--steps", 2, *machine),
    )
    assert sealed.returncode == 0, sealed.stderr
    assert str(key) in sealed.stdout
    refused = diffveil("recover", protected, "--key", key, "--passphrase-file", wrong, *machine)
    assert refused.returncode == 4
    opened = diffveil("recover", protected, "--key", key, "--passphrase-file", right, *machine)
    assert opened.returncode == 0, opened.stderr
    assert (tmp_path / "p-recovered.jpg").is_file()
    for finished in (sealed, refused, opened):
        assert "random" not in finished.stdout + finished.stderr


def test_a_folder_goes_on_after_a_photo_that_fails(
    done: Round, tiny_bundle_path: Path, tmp_path: Path
) -> None:
    photos = tmp_path / "in"
    photos.mkdir()
    (photos / "a.png").write_bytes(b"not a photo")
    Image.new("RGB", (64, 64), "navy").save(photos / "b.png")
    (photos / "c.png").write_bytes(done.photo.read_bytes())
    finished = diffveil(
        *("anonymize", photos, "-o", tmp_path / "out", "--seed", 1, "--steps", 2),
        *("--bundle", tiny_bundle_path, "--json"),
    )
    assert finished.returncode == 5, finished.stderr
    broken, faceless, good = lines(finished)
    assert broken["error"]["kind"] == "PhotoError"
    assert faceless["error"]["kind"] == "NoFaceError"
    assert set(good) == FIELDS
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["c.png"]
    # Alone or beside others: the same seed gives the same photo.
    assert np.array_equal(pixels(tmp_path / "out" / "c.png"), pixels(done.protected))


def test_no_face_is_status_3_or_kept(tiny_bundle_path: Path, tmp_path: Path) -> None:
    photo = tmp_path / "sea.png"
    Image.new("RGB", (64, 48), "navy").save(photo)
    arguments = ("anonymize", photo, "--bundle", tiny_bundle_path)
    refused = diffveil(*arguments)
    assert refused.returncode == 3
    assert not (tmp_path / "sea-anonymized.png").exists()
    kept = diffveil(*arguments, "--on-missing", "keep", "--json")
    assert kept.returncode == 0, kept.stderr
    (report,) = lines(kept)
    assert report["faces"] == []
    assert report["key"] is None
    assert np.array_equal(pixels(tmp_path / "sea-anonymized.png"), pixels(photo))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("key", "broken.veilkey"),
        ("photo", "broken.png"),
        ("size", "80x80"),
        ("bundle", "bundle manifest"),
    ],
)
def test_broken_and_mismatching_files_are_status_5(
    done: Round, tiny_bundle_path: Path, tmp_path: Path, damage: str, message: str
) -> None:
    protected, key, bundle = done.protected, done.key, tiny_bundle_path
    if damage == "key":
        key = tmp_path / "broken.veilkey"
        key.write_bytes(done.key.read_bytes()[:-40])
    elif damage == "photo":
        protected = tmp_path / "broken.png"
        protected.write_bytes(done.protected.read_bytes()[:200])
    elif damage == "size":
        protected = tmp_path / "small.png"
        Image.new("RGB", (80, 80)).save(protected)
    else:
        bundle = tmp_path / "bundle"
        bundle.mkdir()
        (bundle / "bundle.json").write_text("{}", encoding="ascii")
    finished = diffveil(
        *("recover", protected, "--key", key, "--identity", done.identity),
        *("-o", tmp_path / "back.png", "--bundle", bundle),
    )
    assert finished.returncode == 5, finished.stderr
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "back.png").exists()


def test_inspect_tells_what_a_key_file_is_but_not_its_contents(done: Round) -> None:
    finished = diffveil("inspect", done.key, "--json")
    assert finished.returncode == 0, finished.stderr
    (report,) = lines(finished)
    assert report["kind"] == "key file"
    assert report["sealed_to"] == "recipients"
    assert "AGE-SECRET-KEY" not in finished.stdout


@pytest.mark.parametrize("part", ["", "bundle.json"])
def test_inspect_describes_a_bundle(tiny_bundle_path: Path, part: str) -> None:
    finished = diffveil("inspect", tiny_bundle_path / part, "--json")
    assert finished.returncode == 0, finished.stderr
    (report,) = lines(finished)
    assert report["kind"] == "bundle"
    assert {"encode", "decode", "embed", "expand", "denoise", "recognize", "guide"} == set(
        report["programs"]
    )
    people = diffveil("inspect", tiny_bundle_path / part)
    assert report["fingerprint"] in people.stdout


def test_inspect_finds_a_damaged_bundle(tiny_bundle_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    copy.mkdir()
    for file in tiny_bundle_path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    program = copy / "denoise.onnx"
    content = bytearray(program.read_bytes())
    content[len(content) // 2] ^= 1
    program.write_bytes(content)
    finished = diffveil("inspect", copy)
    assert finished.returncode == 5
    assert "denoise.onnx" in finished.stderr


def test_doctor_answers_in_json() -> None:
    finished = diffveil("doctor", "--json")
    assert finished.returncode == 0, finished.stderr
    (report,) = lines(finished)
    assert report["chosen"] == "cpu"
    assert isinstance(report["ready"], bool)


# What follows computes nothing, so it runs in this process.


def status(*arguments: object) -> int:
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as ended:
        return int(str(ended.code))


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("blur", "a.png"),
        ("anonymize",),
        ("anonymize", "none.png"),
        ("anonymize", "a.png", "-o", "a.png"),
        ("anonymize", "a.png", "--variants", "0"),
        ("anonymize", "a.png", "--strength", "1.5"),
        ("anonymize", "a.png", "--strength", "nan"),
        ("anonymize", "a.png", "--seed", "-1"),
        ("anonymize", "a.png", "--on-missing", "ignore"),
        ("anonymize", "a.png", "--passphrase", "secret"),
        ("anonymize", "a.png", "--passphrase-file", "pass.txt"),
        ("anonymize", "a.png", "--key", "k", "--passphrase-file", "none.txt"),
        ("anonymize", "a.png", "--key", "k", "--passphrase-file", "p", "--recipient", "age1"),
        ("anonymize", "a.png", "--key", "k", "--recipient", "age1nonsense"),
        ("anonymize", "a.png", "--key", "a.png", "--passphrase-file", "pass.txt"),
        ("anonymize", "a.png", "--backend", "abacus"),
        ("recover", "a.png"),
        ("recover", "a.png", "--key", "none.veilkey"),
        ("recover", "a.png", "--key", "k.veilkey", "--identity", "none.agekey"),
        ("inspect", "none"),
    ],
    ids=lambda arguments: " ".join(arguments) or "nothing",
)
def test_misuse_is_status_2_and_touches_nothing(
    arguments: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_bundle_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save("a.png")
    Path("k.veilkey").write_bytes(b"")
    Path("pass.txt").write_text(PASSPHRASE, encoding="utf-8")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    if "--backend" in arguments:
        arguments = (*arguments, "--bundle", str(tiny_bundle_path))
    assert status(*arguments) == 2
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--variants", "expected a whole number, got many"),
        ("--seed", "expected a whole number, got many"),
        ("--strength", "expected above 0 up to 1, got many"),
    ],
)
def test_what_is_no_number_is_said_in_words(
    option: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status("anonymize", "a.png", option, "many") == 2
    assert message in capsys.readouterr().err


def test_without_a_terminal_the_passphrase_is_not_waited_for(
    tmp_path: Path, portrait: Image.Image
) -> None:
    portrait.save(tmp_path / "a.png")
    finished = diffveil("anonymize", "a.png", "--key", "k.veilkey", cwd=tmp_path)
    assert finished.returncode == 2
    assert "--passphrase-file" in finished.stderr


def test_export_without_its_extra_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("diffveil.cli.export.find_spec", lambda name: None)
    assert status("export", "somewhere", "-o", "out") == 1
    assert "pip install 'diffveil[export,cpu]'" in capsys.readouterr().err


def test_export_offers_the_exporters_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("export", "--help") == 0
    assert "--weights" in capsys.readouterr().out


def test_a_bug_is_not_dressed_up_as_misuse(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(args: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr("diffveil.cli.doctor.run", broken)
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


def test_an_interruption_is_status_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("diffveil.cli.doctor.run", interrupted)
    assert main(["doctor"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_help_loads_no_engine() -> None:
    code = (
        "import sys\nfrom diffveil.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit('onnxruntime' in sys.modules or 'pyrage' in sys.modules)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert finished.returncode == 0
