"""Key files of the research release: read without PyTorch, recovered on a bundle of that shape."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffveil import (
    KeyFileError,
    KeyMismatchError,
    PhotoError,
    Protector,
    RecoveryKey,
    generate_identity,
    import_research_key,
)
from diffveil.plans import Inversion
from diffveil.torchtensors import read_tensors
from fake_photos import PRESET, Pixels, key_of
from fake_programs import DIMENSIONS, fake_programs

PRESET_OF_DDIM = replace(PRESET, recovery=Inversion("ddim", 30))


def saved(value: object, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def release(rng: np.random.Generator, length: int, width: int, *latent: int) -> tuple[Any, Any]:
    """Key-E and key-I of these sizes, as the release keeps them."""
    key_e = [torch.tensor(rng.standard_normal((1, length, width)), dtype=torch.float32)] * 9
    key_e.append(torch.tensor(rng.standard_normal((1, length, width)), dtype=torch.float32))
    return key_e, torch.tensor(rng.standard_normal((1, *latent)), dtype=torch.float32)


# ---- reading


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_torch_saves_is_read(rng: np.random.Generator, protocol: int) -> None:
    key_e, key_i = release(rng, 77, 768, 4, 64, 64)
    for value in (key_e, tuple(key_e), key_i, key_i.half(), [key_e[0][:, 3:5]]):
        mine = read_tensors(saved(value, pickle_protocol=protocol))
        theirs = value if isinstance(value, (list, tuple)) else [value]
        assert len(mine) == len(theirs)
        for ours, tensor in zip(mine, theirs, strict=True):
            assert ours.dtype == tensor.numpy().dtype
            np.testing.assert_array_equal(ours, tensor.numpy())


class _Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ({"a": torch.zeros(2)}, "EMPTY_DICT"),
        (_Evil(), "names something else"),
        ([torch.zeros(2), _Evil()], "names something else"),
        (torch.nn.Linear(2, 2), "names something else"),
        (torch.zeros(2, dtype=torch.float64), "names something else"),
        ([torch.zeros(2), 1], "something else than 1 to 64 tensors"),
        ([], "something else than 1 to 64 tensors"),
        ([torch.zeros(1)] * 65, "something else than 1 to 64 tensors"),
        (torch.zeros(3, 4).T, "not contiguous"),
        (torch.zeros(1).expand(1000), "not contiguous"),
        (torch.zeros(0), "empty"),
    ],
)
def test_everything_else_is_refused_and_never_run(
    value: object, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyFileError, match=match) as caught:
        read_tensors(saved(value))
    assert not list(tmp_path.iterdir())
    assert caught.value.__context__ is None


def rewritten(
    data: bytes, change: Callable[[str, bytes], bytes], *, compress: bool = False
) -> bytes:
    """The archive with its records changed."""
    file = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w", kind) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return file.getvalue()


def _swap(old: bytes, new: bytes) -> Callable[[str, bytes], bytes]:
    return lambda name, raw: raw.replace(old, new) if name.endswith("data.pkl") else raw


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda name, raw: raw[:-1] if "/data/" in name else raw, "beyond its numbers"),
        (lambda name, raw: b"big" if "byteorder" in name else raw, "little-endian"),
        (lambda name, raw: raw[:-1] if name.endswith(".pkl") else raw, "damaged"),
        (lambda name, raw: b"" if name.endswith(".pkl") else raw, "damaged"),
        (lambda name, raw: raw + b"." * 70_000 if name.endswith(".pkl") else raw, "65536 bytes"),
        (_swap(b"K\x06", b"J\xff\xff\xff\x7f"), "compressed or has more|beyond its numbers"),
        (_swap(b"K\x02K\x03", b"K\x02K\x04"), "not contiguous"),
        (_swap(b"K\x02K\x03\x86", b"J\xff\xff\xff\xffK\x03\x86"), "malformed"),
        (_swap(b"FloatStorage", b"FloatStoraga"), "names something else"),
        (_swap(b"_rebuild_tensor_v2", b"_rebuild_tensor_v3"), "names something else"),
    ],
)
def test_damaged_and_hostile_archives(change: Callable[[str, bytes], bytes], match: str) -> None:
    data = rewritten(saved(torch.arange(6.0).reshape(2, 3)), change)
    with pytest.raises(KeyFileError, match=match):
        read_tensors(data)


def test_archives_cannot_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(torch.zeros(1000))
    with pytest.raises(KeyFileError, match="compressed"):
        read_tensors(rewritten(data, lambda _, raw: raw, compress=True))
    with pytest.raises(KeyFileError, match="more than 64 records"):
        read_tensors(data + b"PK\x01\x02" * 65)
    with pytest.raises(KeyFileError, match="larger than"):
        read_tensors(bytes((16 << 20) + 1))
    monkeypatch.setattr("diffveil.torchtensors.MAX_TENSOR_FILE_BYTES", len(data))
    with pytest.raises(KeyFileError, match="records are larger"):
        read_tensors(overlapping(data))


def overlapping(data: bytes) -> bytes:
    """Two names for one record: what is read is more than what there is."""
    file = io.BytesIO()
    pickle_of_two = saved([torch.zeros(1000), torch.ones(1000)])
    with zipfile.ZipFile(io.BytesIO(pickle_of_two)) as old, zipfile.ZipFile(file, "w") as new:
        (program,) = (n for n in old.namelist() if n.endswith("data.pkl"))
        new.writestr(program, old.read(program))
        first = program.replace("data.pkl", "data/0")
        new.writestr(first, bytes(4000))
        twin = zipfile.ZipInfo(first[:-1] + "1")
        info = new.getinfo(first)
        for name in ("header_offset", "CRC", "file_size", "compress_size"):
            setattr(twin, name, getattr(info, name))
        new.filelist.append(twin)
        new.NameToInfo[twin.filename] = twin
    raw = file.getvalue()
    assert len(raw) < len(data) + 4000
    return raw


@pytest.mark.parametrize("data", [b"", b"PK", b"\x80\x02}q\x00.", bytes(1000)])
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(KeyFileError, match="not a zip archive"):
        read_tensors(data)


# ---- the key


def test_the_release_recovers_on_a_bundle_of_its_shape(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    programs = fake_programs(tmp_path / "bundle")
    d = DIMENSIONS
    key_e, key_i = release(rng, d.conditioning_length, d.conditioning_width, 8, 4, 4)
    photo: Pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    key = import_research_key(programs.bundle, photo, saved(key_e), saved(key_i), steps=30)
    assert key.faces[0].tokens.shape == (10, d.conditioning_length, d.conditioning_width)
    recipient, identity = generate_identity()
    key = RecoveryKey.unseal(key.seal_bytes(recipients=[recipient]), identity=identity)
    protector = Protector(programs)
    recovered = protector.recover(photo, key)
    # Beside a key of tokens with the same sampler and steps, in one call.
    own = protector.anonymize(photo, aligned=True, preset=PRESET_OF_DDIM, seed=1)
    both = protector.recover([photo, own.image], [key, key_of(own)])
    np.testing.assert_array_equal(both[0].image, recovered.image)
    programs.backend.calls.clear()  # type: ignore[attr-defined]
    protector.recover(photo, key)
    # By hand: the sampler's own table, the conditionings as they are.
    operations = protector.operations
    expected = operations.recover(
        torch.cat(key_e).numpy()[None], key_i.numpy()[None], Inversion("ddim", 30)
    )
    conditionings = [i["conditioning"] for i in programs.backend.inputs("denoise")]  # type: ignore[attr-defined]
    assert any(np.array_equal(c[0], key_e[9][0]) for c in conditionings)
    assert not programs.backend.inputs("expand")  # type: ignore[attr-defined]
    # The photo is the crop at twice its size, and the fake decoder draws cells of 8 pixels.
    seen = np.asarray(recovered.image)[24, 24].astype(float)
    np.testing.assert_allclose(seen, (expected[0, :, 12, 12] + 1) * 127.5, atol=1)


def test_the_shapes_of_stable_diffusion_pass_through_a_key_file(rng: np.random.Generator) -> None:
    from diffveil.keys import FaceKey
    from key_samples import make_key

    key_e, key_i = release(rng, 77, 768, 4, 64, 64)
    e, (i,) = read_tensors(saved(key_e)), read_tensors(saved(key_i))
    face = FaceKey(
        np.concatenate(e), i, np.eye(2, 3), (0, 0, 512, 512), rng.uniform(0, 512, (5, 2))
    )
    key = make_key(rng, faces=(face,), sampler="ddim", steps=100)
    recipient, identity = generate_identity()
    sealed = key.seal_bytes(recipients=[recipient])
    assert RecoveryKey.unseal(sealed, identity=identity) == key
    assert len(sealed) < 2_500_000


def test_files_that_are_not_such_keys_are_refused(
    tmp_path: Path, rng: np.random.Generator, portrait: Pixels
) -> None:
    bundle = fake_programs(tmp_path / "bundle").bundle
    d = DIMENSIONS
    key_e, key_i = release(rng, d.conditioning_length, d.conditioning_width, 8, 4, 4)
    square = portrait[:64, :64]

    def attempt(e: object = key_e, i: object = key_i, photo: Pixels = square) -> None:
        import_research_key(bundle, photo, saved(e), saved(i))

    attempt()
    with pytest.raises(KeyFileError, match="key-E: expected a list of 10"):
        attempt(e=key_e[:9])
    with pytest.raises(KeyFileError, match="key-E: its tensors"):
        attempt(e=[*key_e[:9], key_e[0].half()])
    with pytest.raises(KeyFileError, match="key-I: expected one"):
        attempt(i=[key_i, key_i])
    with pytest.raises(KeyMismatchError, match="exported from the weights"):
        attempt(i=key_i[:, :4].clone())
    with pytest.raises(PhotoError, match="square"):
        attempt(photo=portrait)
    nan = key_i.clone()
    nan[0, 0, 0, 0] = torch.nan
    with pytest.raises(KeyFileError, match="finite"):
        attempt(i=nan)
    (tmp_path / "e.pt").write_bytes(saved(key_e))
    with pytest.raises(KeyFileError, match="Cannot read"):
        import_research_key(bundle, square, tmp_path / "e.pt", tmp_path / "i.pt")
