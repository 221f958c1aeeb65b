"""Engine files: which are found fit to be loaded, and what is said about the others."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffveil.bundle import Bundle
from diffveil.engines import device
from diffveil.engines.records import (
    RECORD_FILE,
    EngineRecord,
    ShapeRange,
    engine_folder,
    find_engine,
    parse_records,
    program_digest,
    read_records,
)
from diffveil.errors import BundleError, EngineError
from fake_programs import fake_bundle

WHERE = ("tensorrt-rtx", "1.7.1.116", "sm89")
ENGINE = bytes(range(256)) * 4
posix = pytest.mark.skipif(os.name != "posix", reason="file modes and owners are POSIX")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return fake_bundle(tmp_path / "bundle")


@pytest.fixture
def record(bundle: Bundle) -> EngineRecord:
    return EngineRecord(
        program="decode",
        program_sha256=program_digest(bundle, "decode"),
        backend=WHERE[0],
        version=WHERE[1],
        target=WHERE[2],
        recipe=1,
        profile={"latent": ShapeRange((1, 8, 4, 4), (4, 8, 4, 4), (8, 8, 4, 4))},
        inputs={"latent": "float32"},
        outputs={"image": "float32"},
        flags={"weights": "folded", "memory_mib": None, "refittable": False},
        file="decode.engine",
        sha256=hashlib.sha256(ENGINE).hexdigest(),
        bytes=len(ENGINE),
        seconds=1.5,
    )


def write(bundle: Bundle, *records: EngineRecord, engine: bytes = ENGINE) -> Path:
    folder = engine_folder(bundle, *WHERE)
    folder.mkdir(parents=True)
    rows = [asdict(record) for record in records]
    content = {"format": "diffveil-engines", "version": 1, "engines": rows}
    (folder / RECORD_FILE).write_text(json.dumps(content), encoding="utf-8")
    for record in records:
        if Path(record.file).name == record.file:
            (folder / record.file).write_bytes(engine)
    return folder


def test_a_fitting_engine_is_found_and_read(bundle: Bundle, record: EngineRecord) -> None:
    folder = write(bundle, record)
    found = find_engine(bundle, "decode", *WHERE)
    assert found.path == folder / "decode.engine"
    assert found.record == record
    assert found.record.max_batch == 8
    assert found.read() == ENGINE


def test_without_engines_the_command_that_builds_them_is_named(bundle: Bundle) -> None:
    with pytest.raises(
        EngineError, match=r"no engines at.*run `diffveil build .*--backend tensorrt"
    ):
        find_engine(bundle, "decode", *WHERE)


def test_a_program_without_engine_and_an_unknown_program(
    bundle: Bundle, record: EngineRecord
) -> None:
    write(bundle, record)
    with pytest.raises(EngineError, match=r"no engine of program 'encode'.*--programs encode"):
        find_engine(bundle, "encode", *WHERE)
    with pytest.raises(BundleError, match="no program 'blur'"):
        find_engine(bundle, "blur", *WHERE)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("program_sha256", "0" * 64),
        ("backend", "tensorrt"),
        ("version", "1.6.1.120"),
        ("target", "sm86"),
        ("file", "encode.engine"),
    ],
)
def test_an_engine_for_something_else_is_refused_by_field(
    bundle: Bundle, record: EngineRecord, field: str, value: str
) -> None:
    write(bundle, replace(record, **{field: value}))  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=f"built for something else: {field}: received") as caught:
        find_engine(bundle, "decode", *WHERE)
    assert value[:16] in str(caught.value)


def test_all_differing_fields_are_named_at_once(bundle: Bundle, record: EngineRecord) -> None:
    write(bundle, replace(record, version="1.6.1.120", target="sm86", program_sha256="0" * 64))
    with pytest.raises(EngineError) as caught:
        find_engine(bundle, "decode", *WHERE)
    for field in ("program_sha256", "version", "target"):
        assert f"{field}: received" in str(caught.value)


def test_a_changed_weight_file_changes_the_programs_content(tmp_path: Path) -> None:
    assert program_digest(fake_bundle(tmp_path / "a"), "decode") != program_digest(
        fake_bundle(tmp_path / "b", name="other"), "decode"
    )


@given(at=st.integers(0, len(ENGINE) - 1), bit=st.integers(0, 7))
def test_any_flipped_bit_of_an_engine_is_found(
    tmp_path_factory: pytest.TempPathFactory, at: int, bit: int
) -> None:
    bundle = fake_bundle(tmp_path_factory.mktemp("bundle"))
    plain = EngineRecord(
        "decode",
        program_digest(bundle, "decode"),
        *WHERE,
        1,
        {"latent": ShapeRange((1,), (1,), (1,))},
        {},
        {},
        {},
        "decode.engine",
        hashlib.sha256(ENGINE).hexdigest(),
        len(ENGINE),
        0.0,
    )
    damaged = bytearray(ENGINE)
    damaged[at] ^= 1 << bit
    write(bundle, plain, engine=bytes(damaged))
    with pytest.raises(EngineError, match="differs from its record: sha256: received"):
        find_engine(bundle, "decode", *WHERE)
    unchecked = find_engine(bundle, "decode", *WHERE, check_contents=False)
    with pytest.raises(EngineError, match="sha256: received"):
        unchecked.read()


@pytest.mark.parametrize("engine", [ENGINE[:-1], ENGINE + b"\0", b""])
def test_an_engine_of_another_size_is_refused(
    bundle: Bundle, record: EngineRecord, engine: bytes
) -> None:
    write(bundle, record, engine=engine)
    with pytest.raises(EngineError, match=f"bytes: received {len(engine)}, expected {len(ENGINE)}"):
        find_engine(bundle, "decode", *WHERE, check_contents=False)


@posix
@pytest.mark.parametrize("what", ["decode.engine", RECORD_FILE, ".", ".."])
def test_what_everybody_can_write_is_refused(
    bundle: Bundle, record: EngineRecord, what: str
) -> None:
    place = write(bundle, record) / what
    place.chmod(place.stat().st_mode | 0o002)
    with pytest.raises(EngineError, match=r"written by everybody.*chmod o-w"):
        find_engine(bundle, "decode", *WHERE)


@posix
@pytest.mark.parametrize("what", ["decode.engine", RECORD_FILE, "."])
def test_what_belongs_to_somebody_else_is_refused(
    bundle: Bundle, record: EngineRecord, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = write(bundle, record) / what
    number = place.stat().st_ino
    lstat, fstat = os.lstat, os.fstat

    def foreign(state: os.stat_result) -> os.stat_result:
        return os.stat_result((*state[:4], 4242, *state[5:10])) if state.st_ino == number else state

    monkeypatch.setattr(os, "lstat", lambda path: foreign(lstat(path)))
    monkeypatch.setattr(os, "fstat", lambda number: foreign(fstat(number)))
    with pytest.raises(EngineError, match=r"belongs to user 4242.*engines are code"):
        find_engine(bundle, "decode", *WHERE)


@posix
def test_root_may_install_engines_for_others(
    bundle: Bundle, record: EngineRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(bundle, record)
    if folder.stat().st_uid != 0:
        pytest.skip("needs files that belong to root")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert find_engine(bundle, "decode", *WHERE).record == record


@posix
@pytest.mark.parametrize("what", ["decode.engine", RECORD_FILE])
def test_links_and_pipes_are_refused(bundle: Bundle, record: EngineRecord, what: str) -> None:
    place = write(bundle, record) / what
    elsewhere = place.with_name("elsewhere")
    place.rename(elsewhere)
    place.symlink_to(elsewhere)
    with pytest.raises(EngineError, match="plain file"):
        find_engine(bundle, "decode", *WHERE)
    place.unlink()
    os.mkfifo(place)
    with pytest.raises(EngineError, match="plain file"):
        find_engine(bundle, "decode", *WHERE)


@pytest.mark.parametrize("part", ["..", "a/b", "", "a b", "x" * 65])
def test_names_cannot_lead_out_of_the_bundle(bundle: Bundle, part: str) -> None:
    with pytest.raises(EngineError, match="cannot be part of the name"):
        engine_folder(bundle, "tensorrt-rtx", "1.7", part)
    with pytest.raises(EngineError):
        find_engine(bundle, "decode", part, "1.7", "sm89")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.pop("sha256"), "sha256: missing"),
        (lambda row: row.update(extra=1), "extra: unknown field"),
        (lambda row: row.update(bytes=True), "bytes: expected an integer"),
        (lambda row: row.update(bytes=0), "bytes: expected an integer"),
        (lambda row: row.update(seconds=float("inf")), "seconds: expected a number"),
        (lambda row: row.update(program_sha256="x"), "program_sha256: expected 64"),
        (lambda row: row.update(profile={}), "profile: expected at least one input"),
        (lambda row: row["profile"]["latent"].update(min=[9, 8, 4, 4]), "min ≤ opt ≤ max"),
        (lambda row: row["profile"]["latent"].update(opt=[4]), "of one rank"),
        (lambda row: row["profile"]["latent"].pop("max"), "max: missing"),
        (lambda row: row["flags"].update(x=[]), r"flags.x: expected a boolean"),
        (lambda row: row["inputs"].update(latent=5), r"inputs.latent: expected text"),
    ],
)
def test_malformed_records_are_refused_by_field(
    record: EngineRecord, change: Any, message: str
) -> None:
    row = json.loads(json.dumps(asdict(record)))
    change(row)
    with pytest.raises(EngineError, match=message):
        parse_records({"format": "diffveil-engines", "version": 1, "engines": [row]})


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{", b'{"format": "x"}', b'{"format":"diffveil-engines","version":2}']
)
def test_what_is_no_record_is_refused_with_its_name(bundle: Bundle, raw: bytes) -> None:
    folder = engine_folder(bundle, *WHERE)
    folder.mkdir(parents=True)
    (folder / RECORD_FILE).write_bytes(raw)
    with pytest.raises(EngineError, match=RECORD_FILE):
        read_records(folder)


def test_two_records_of_a_program_are_refused(record: EngineRecord) -> None:
    rows = [json.loads(json.dumps(asdict(record)))] * 2
    with pytest.raises(EngineError, match="appears twice"):
        parse_records({"format": "diffveil-engines", "version": 1, "engines": rows})


class FakeDriver:
    """CUDA's driver interface, as far as it is asked."""

    def __init__(self, major: int, minor: int, *, failing: str = "") -> None:
        self.values, self.failing = {75: major, 76: minor}, failing

    def cuInit(self, flags: int) -> int:
        return 100 * (self.failing == "cuInit")

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        return 101 * (self.failing == "cuDeviceGet" or ordinal > 0)

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        value._obj.value = self.values[attribute]
        return 1 * (self.failing == "cuDeviceGetAttribute")


@pytest.mark.parametrize(("major", "minor", "name"), [(8, 9, "sm89"), (12, 0, "sm120")])
def test_the_present_gpu_is_named_by_its_capability(major: int, minor: int, name: str) -> None:
    assert device.present_target(load_driver=lambda: FakeDriver(major, minor)) == name
    assert device.present_target(1, load_driver=lambda: FakeDriver(major, minor)) is None


@pytest.mark.parametrize("failing", ["cuInit", "cuDeviceGet", "cuDeviceGetAttribute"])
def test_a_driver_that_fails_is_no_gpu(failing: str) -> None:
    assert device.present_target(load_driver=lambda: FakeDriver(8, 9, failing=failing)) is None


def test_no_driver_is_no_gpu() -> None:
    def missing() -> Any:
        raise OSError("libcuda.so.1: cannot open shared object file")

    assert device.present_target(load_driver=missing) is None
