"""`diffveil key`, and recovery with the keys of several holders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffveil import Protector, RecoveryKey, Result, generate_identity
from diffveil.cli.main import main
from fake_photos import PRESET, Pixels, key_of
from fake_programs import DIMENSIONS, fake_bundle

Pair = tuple[str, str]


@pytest.fixture(scope="module")
def me() -> Pair:
    return generate_identity()


@pytest.fixture(scope="module")
def you() -> Pair:
    return generate_identity()


@pytest.fixture
def result(protector: Protector, group: Pixels) -> Result:
    return protector.anonymize(group, preset=PRESET, seed=1)


@pytest.fixture
def folder(result: Result, me: Pair, you: Pair, tmp_path: Path) -> Path:
    """group.png and its key, sealed to me; my identity and yours."""
    folder = tmp_path / "files"
    folder.mkdir()
    result.save(folder / "group.png")
    key_of(result).seal(folder / "group.veilkey", recipients=[me[0]])
    (folder / "me").write_text(me[1], encoding="ascii")
    (folder / "you").write_text(you[1], encoding="ascii")
    return folder


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(folder)
    return lambda *words: main([str(word) for word in words])


def test_show_says_what_a_key_is(run: Any, me: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("key", "show", "group.veilkey", "--identity", "me", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["faces"] == [0, 1]
    assert record["recipients"] == [me[0]]
    assert record["photo_size"] == [100, 160]
    assert run("key", "show", "group.veilkey", "--identity", "me") == 0
    assert "o-belm" in capsys.readouterr().out
    assert run("key", "show", "group.veilkey", "--identity", "you") == 4
    assert run("key", "show", "none.veilkey", "--identity", "me") == 2


def test_reseal_changes_who_opens(
    run: Any, me: Pair, you: Pair, result: Result, capsys: pytest.CaptureFixture[str]
) -> None:
    change = ("key", "reseal", "group.veilkey", "--identity")
    assert run(*change, "me", "--add", you[0]) == 0
    assert "2 recipients" in capsys.readouterr().out
    assert run(*change, "you", "--remove", me[0]) == 0
    assert run("key", "show", "group.veilkey", "--identity", "me") == 4
    assert run(*change, "you", "--remove", you[0]) == 2  # nobody would be left
    assert run(*change, "you", "--add", me[0], "--to", me[0]) == 2
    assert run(*change, "you", "--to", me[0], "-o", "new.veilkey") == 0
    assert RecoveryKey.unseal("new.veilkey", identity=me[1]) == key_of(result)
    assert run(*change, "you", "--to", me[0], "-o", "new.veilkey") == 2  # never overwritten
    Path("weak").write_text("1234", encoding="ascii")
    assert run(*change, "you", "--to-passphrase-file", "weak") == 2
    assert "--allow-weak-passphrase" in capsys.readouterr().err
    assert RecoveryKey.unseal("group.veilkey", identity=you[1]) == key_of(result)


def test_a_weak_passphrase_can_be_insisted_on(
    run: Any, result: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyrage

    import age_reference as age

    monkeypatch.setattr(pyrage.passphrase, "encrypt", age.seal_scrypt)  # takes no time
    Path("weak").write_text("1234", encoding="ascii")
    weak = ("--to-passphrase-file", "weak", "--allow-weak-passphrase")
    assert run("key", "reseal", "group.veilkey", "--identity", "me", *weak) == 0
    assert RecoveryKey.unseal("group.veilkey", passphrase="1234") == key_of(result)


def test_split_gives_each_face_a_holder(
    run: Any, me: Pair, you: Pair, result: Result, capsys: pytest.CaptureFixture[str]
) -> None:
    split = ("key", "split", "group.veilkey", "-o", "keys", "--identity", "me")
    assert run(*split, "--holder", f"0={me[0]}", "--holder", f"1={you[0]}") == 0
    names = sorted(path.name for path in Path("keys").iterdir())
    assert names == ["group.face-0.veilkey", "group.face-1.veilkey"]
    parts = key_of(result).split()
    assert RecoveryKey.unseal("keys/group.face-0.veilkey", identity=me[1]) == parts[0]
    assert RecoveryKey.unseal("keys/group.face-1.veilkey", identity=you[1]) == parts[1]
    assert run("key", "show", "keys/group.face-1.veilkey", "--identity", "me") == 4
    for wrong in (f"7={me[0]}", "0", f"x={me[0]}", "0=age1nonsense"):
        assert run(*split[:-2], "--identity", "me", "--holder", wrong) == 2
    capsys.readouterr()
    assert run(*split, "--to", me[0]) == 2  # they are there already
    assert "exists already" in capsys.readouterr().err


def test_split_and_join_are_inverse(run: Any, me: Pair, result: Result) -> None:
    identity = ("--identity", "me", "--to", me[0])
    assert run("key", "split", "group.veilkey", "-o", "keys", *identity) == 0
    parts = ("keys/group.face-1.veilkey", "keys/group.face-0.veilkey")
    assert run("key", "join", *parts, "-o", "again.veilkey", *identity) == 0
    assert RecoveryKey.unseal("again.veilkey", identity=me[1]) == key_of(result)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other"])
def test_a_damaged_key_is_status_5_and_nothing_is_written(run: Any, me: Pair, damage: str) -> None:
    key = Path("group.veilkey")
    content = key.read_bytes()
    key.write_bytes(
        {
            "flip": content[:-1] + bytes([content[-1] ^ 1]),
            "cut": content[:-20],
            "empty": b"",
            "other": Path("group.png").read_bytes(),
        }[damage]
    )
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    by_me = ("--identity", "me")
    for words in (
        ("show", key, *by_me),
        ("reseal", key, *by_me, "--add", me[0]),
        ("reseal", key, *by_me, "--to", me[0], "-o", "new.veilkey"),
        ("split", key, *by_me, "-o", "keys", "--to", me[0]),
        ("join", key, key, *by_me, "-o", "new.veilkey", "--to", me[0]),
    ):
        assert run("key", *words) == 5
        assert {path.name: path.read_bytes() for path in Path().iterdir()} == before


@pytest.fixture
def recovered(protector: Protector, monkeypatch: pytest.MonkeyPatch) -> None:
    """`diffveil recover` on the fake programs."""
    monkeypatch.setattr(Protector, "load", lambda *args, **options: protector)


def test_recover_takes_the_keys_in_hand(
    run: Any, recovered: None, me: Pair, protector: Protector, result: Result
) -> None:
    assert run("key", "split", "group.veilkey", "-o", "k", "--identity", "me", "--to", me[0]) == 0
    zero, one = ("--key", "k/group.face-0.veilkey"), ("--key", "k/group.face-1.veilkey")
    assert run("recover", "group.png", *zero, "--identity", "me", "-o", "zero.png") == 0
    assert run("recover", "group.png", *zero, *one, "--identity", "me", "-o", "both.png") == 0
    part = protector.recover(result.image, key_of(result).select([0])).image
    whole = protector.recover(result.image, key_of(result)).image
    for name, image in (("zero.png", part), ("both.png", whole)):
        with Image.open(name) as file:
            np.testing.assert_array_equal(np.asarray(file), np.asarray(image))
    assert run("recover", "zero.png", *one, "--identity", "me", "-o", "x.png") == 5
    assert not Path("x.png").exists()
    assert run("recover", "zero.png", *one, "--identity", "me", "-o", "x.png", "--reencoded") == 0


def test_a_folder_of_split_keys_gives_each_holder_the_own_face(
    run: Any,
    recovered: None,
    me: Pair,
    you: Pair,
    protector: Protector,
    result: Result,
    capsys: pytest.CaptureFixture[str],
) -> None:
    split = ("key", "split", "group.veilkey", "-o", "keys", "--identity", "me")
    assert run(*split, "--holder", f"0={me[0]}", "--holder", f"1={you[0]}") == 0
    for number, who in enumerate(("me", "you")):
        recover = ("recover", "group.png", "--key", "keys", "--identity", who)
        assert run(*recover, "-o", f"{who}.png") == 0
        expected = protector.recover(result.image, key_of(result).select([number])).image
        with Image.open(f"{who}.png") as file:
            np.testing.assert_array_equal(np.asarray(file), np.asarray(expected))
    Path("nobody").write_text(generate_identity()[1], encoding="ascii")
    assert run(*recover[:-1], "nobody", "-o", "x.png") == 4
    both = [f"keys/group.face-{number}.veilkey" for number in (0, 1)]
    named = ("--key", both[0], "--key", both[1])
    assert run("recover", "group.png", *named, "--identity", "me", "-o", "x.png") == 4
    Path(both[1]).write_bytes(b"broken")
    assert run(*recover[:-1], "me", "-o", "x.png") == 5
    assert "group.face-1.veilkey" in capsys.readouterr().err
    assert not Path("x.png").exists()


def test_another_picture_is_status_5(
    run: Any, recovered: None, result: Result, capsys: pytest.CaptureFixture[str]
) -> None:
    result.image.save("copy.jpg", quality=80)
    words = ("recover", "copy.jpg", "--key", "group.veilkey", "--identity", "me", "-o", "x.png")
    assert run(*words) == 5
    assert "--reencoded" in capsys.readouterr().err
    assert not Path("x.png").exists()
    assert run(*words, "--reencoded") == 0


def test_research_keys_are_sealed(
    run: Any, me: Pair, tmp_path: Path, rng: np.random.Generator
) -> None:
    import torch

    bundle = fake_bundle(tmp_path / "sd")
    d = DIMENSIONS
    torch.save([torch.zeros(1, d.conditioning_length, d.conditioning_width)] * 10, "e.pt")
    torch.save(torch.ones(1, 8, 4, 4), "zt.pt")
    Image.new("RGB", (64, 64), "teal").save("face.png")
    words = ("key", "import-research", "e.pt", "zt.pt", "--photo", "face.png", "-o", "r.veilkey")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffveil.bundle.Bundle.load", lambda *_: bundle)
        assert run(*words, "--bundle", tmp_path / "sd", "--recipient", me[0]) == 0
        Path("zt.pt").write_bytes(b"no tensors")
        assert run(*words[:-1], "s.veilkey", "--bundle", "sd", "--recipient", me[0]) == 5
    assert not Path("s.veilkey").exists()
    key = RecoveryKey.unseal("r.veilkey", identity=me[1])
    assert (key.sampler, key.steps, key.backend) == ("ddim", 100, "research-release")
