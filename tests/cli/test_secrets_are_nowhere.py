"""Runs the command line with known secrets and searches all that it printed, logged and wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffveil import RecoveryKey, generate_identity
from fake_photos import smooth_photo

PASSPHRASE = "zebra quartz umbrella"
WRONG = "walrus violin wednesday"

# Runs each command line in one process with everything logged, and lists the files that are opened
# for writing. The library's entry is used as well: what fails there must not tell either.
SCRIPT = """
import json, logging, os, sys
from pathlib import Path
logging.basicConfig(level=logging.DEBUG)
written = []
def watch(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)) and isinstance(args[2], int):
        if args[2] & (os.O_WRONLY | os.O_RDWR):
            written.append(os.fsdecode(args[0]))
from fake_photos import TWO, ListedDetector
from fake_programs import fake_programs
from diffveil import Protector, RecoveryKey
from diffveil.cli.main import main
programs = fake_programs(Path("bundle"))
detector = ListedDetector({(100, 160): TWO})
Protector.load = lambda *args, **options: Protector(programs, detector=detector)
sys.addaudithook(watch)
codes = []
for words in json.loads(Path("commands.json").read_text()):
    try:
        codes.append(main(words))
    except SystemExit as error:
        codes.append(error.code)
    print("---", flush=True)
key = RecoveryKey.unseal("group.veilkey", identity="me")
print(key, key.faces, [key], vars(key).keys())
logging.getLogger("app").info("made %s and %r", key, key.faces[0])
Path("codes.json").write_text(json.dumps([codes, written]))
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[int], list[str]]:
    """The folder, what was printed and logged, exit codes, and files opened for writing."""
    folder = tmp_path_factory.mktemp("nowhere")
    me, identity = generate_identity()
    stranger, other = generate_identity()
    photo = smooth_photo(np.random.default_rng(4), 100, 160)
    Image.fromarray(photo).save(folder / "group.png")
    texts = {
        "me": identity,
        "other": other,
        "pass": PASSPHRASE,
        "wrong": WRONG,
        "twice": f"{PASSPHRASE}\n{PASSPHRASE}",
        "broken": identity[:-1],
        "short": PASSPHRASE[:6],
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="ascii")
    protected = ("group-anonymized.png", "--key", "group.veilkey")
    by_me = ("--identity", "me")
    reseal = ("key", "reseal", "group.veilkey", *by_me)
    opened = ("recover", protected[0], "-o", "x.png", "--key", "p.veilkey", "--passphrase-file")
    commands = [
        ("anonymize", "group.png", "--key", "group.veilkey", "--recipient", me, "--steps", "4"),
        ("anonymize", "group.png", "-o", "x.png", "--key", "x.veilkey", "--recipient", identity),
        ("anonymize", "group.png", "-o", "x.png", "--key", "x", "--passphrase-file", "twice"),
        ("anonymize", "group.png", "-o", "x.png", "--key", "x", "--passphrase-file", "short"),
        ("recover", *protected, *by_me, "--json"),
        ("recover", *protected, "-o", "x.png", "--identity", "other"),
        ("recover", *protected, "-o", "x.png", "--identity", "broken"),
        ("recover", *protected, "-o", "x.png", "--identity", identity),
        ("recover", *protected, "-o", "x.png", "--passphrase-file", "pass"),
        ("recover", "group.png", "--key", "group.veilkey", *by_me, "-o", "x.png", "--json"),
        (*reseal, "-o", "p.veilkey", "--to-passphrase-file", "pass"),
        (*opened, PASSPHRASE),
        (
            "recover",
            protected[0],
            "--key",
            "p.veilkey",
            "-o",
            "x.png",
            "--passphrase-file",
            "wrong",
        ),
        ("key", "show", "group.veilkey", *by_me),
        ("key", "split", "group.veilkey", "-o", "keys", *by_me, "--holder", f"1={stranger}"),
        (*reseal, "--add", stranger),
        (*reseal, "--remove", identity),
        ("inspect", "p.veilkey"),
    ]
    (folder / "commands.json").write_text(json.dumps(commands), encoding="ascii")
    (folder / "tmp").mkdir()
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    finished = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "ignore", "-c", SCRIPT],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(folder / "tmp")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    codes, written = json.loads((folder / "codes.json").read_text(encoding="ascii"))
    return folder, finished.stdout + finished.stderr, codes, written


def test_the_commands_did_what_they_were_meant_to(
    ran: tuple[Path, str, list[int], list[str]],
) -> None:
    folder, _, codes, _ = ran
    assert codes == [0, 2, 2, 2, 0, 4, 2, 2, 4, 5, 0, 2, 4, 0, 0, 0, 2, 0]
    assert not (folder / "x.png").exists()
    assert not (folder / "x.veilkey").exists()
    assert not (folder / "x").exists()


def test_no_secret_is_printed_or_logged(ran: tuple[Path, str, list[int], list[str]]) -> None:
    folder, text, _, _ = ran
    assert "---" in text
    for name in ("me", "other"):
        token = (folder / name).read_text(encoding="ascii").removeprefix("AGE-SECRET-KEY-1")
        for case in (token[:12], token[:12].lower()):
            assert case not in text
    for word in (PASSPHRASE[:6], WRONG[:6]):
        assert word not in text


def test_no_key_material_is_printed_or_written_but_sealed(
    ran: tuple[Path, str, list[int], list[str]],
) -> None:
    folder, text, _, _ = ran
    key = RecoveryKey.unseal(folder / "group.veilkey", identity=folder / "me")
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    secrets = {"me", "other", "pass", "wrong", "twice", "broken", "short", "commands.json"}
    for face in key.faces:
        for codes in (face.tokens, face.latents):
            number = f"{codes.flat[0]:.6f}"[:7]
            assert number not in text
            for array in (codes, codes.astype(np.float32)):
                raw = array.tobytes()[:12]
                assert raw.hex() not in text
                assert not [path.name for path, content in files.items() if raw in content]
    for path, content in files.items():
        if path.name not in secrets:
            assert PASSPHRASE.encode() not in content
            assert b"SECRET-KEY-1" not in content
    assert not list((folder / "tmp").iterdir())


def test_only_results_were_ever_opened_for_writing(
    ran: tuple[Path, str, list[int], list[str]],
) -> None:
    _, _, _, written = ran
    names = {Path(path).name.lstrip(".").partition(".")[0] for path in written}
    assert names <= {"group-anonymized", "group-anonymized-recovered", "group", "p"}
    assert {"group-anonymized", "group", "p"} <= names


def test_key_files_are_their_owners_only(ran: tuple[Path, str, list[int], list[str]]) -> None:
    folder, *_ = ran
    keys = list(folder.rglob("*.veilkey"))
    assert {key.name for key in keys} == {"group.veilkey", "p.veilkey", "group.face-1.veilkey"}
    if os.name == "posix":
        assert {key.stat().st_mode & 0o777 for key in keys} == {0o600}
