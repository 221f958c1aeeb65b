"""TensorRT-RTX's compiled kernels, kept beside engines; on a stand-in for the library."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffveil.bundle import Bundle
from diffveil.engines import TensorRT
from diffveil.engines.native import NativeEngine
from diffveil.engines.records import engine_folder
from fake_cuda import FakeDriver
from fake_trt_runtime import TARGET, VERSION, FakeTensorRT, write_engines

NAME = "encode.A-fake-GPU-driver-13.2.kernels"


@pytest.fixture
def bundle(tiny_bundle: Bundle, tmp_path: Path) -> Bundle:
    shutil.copytree(tiny_bundle.path, tmp_path / "bundle")
    bundle = Bundle.load(tmp_path / "bundle")
    write_engines(bundle, programs=("encode",))
    return bundle


def encode(
    bundle: Bundle, *, rtx: bool = True, rows: tuple[int, ...] = (1, 2, 2), broken: str = ""
) -> FakeTensorRT:
    """What a process does that runs an engine a few times."""
    driver = FakeDriver()
    trt = FakeTensorRT(driver, rtx=rtx)
    trt.raises.add(broken)
    backend = TensorRT(
        driver=driver, import_module=lambda name: trt, find_gpu=lambda ordinal: TARGET
    )
    engine: Any = backend.load(bundle, "encode")
    for count in rows:
        engine.run(image=np.zeros((count, 3, 32, 32), np.float32))
    engine.close()
    return trt


def file_of(bundle: Bundle) -> Path:
    return engine_folder(bundle, "tensorrt-rtx", VERSION, TARGET) / NAME


def test_the_next_process_compiles_nothing(bundle: Bundle) -> None:
    assert encode(bundle).compiled == 1
    assert file_of(bundle).read_bytes() == b"kernels"
    written = file_of(bundle).stat().st_mtime_ns
    again = encode(bundle)
    assert again.compiled == 0
    assert again.caches is not None
    assert len(again.caches) == 1  # all contexts of an engine share one
    assert file_of(bundle).stat().st_mtime_ns == written
    assert not list(file_of(bundle).parent.glob(".kernels-*"))


@pytest.mark.parametrize("content", [b"", b"kernel", b"kernels of another GPU"])
def test_a_bad_cache_is_passed_over_and_replaced(bundle: Bundle, content: bytes) -> None:
    file_of(bundle).write_bytes(content)
    with pytest.warns(RuntimeWarning, match=r"passed over and compiled again: it is damaged"):
        assert encode(bundle).compiled == 1
    assert file_of(bundle).read_bytes() == b"kernels"


def test_a_cache_that_everybody_could_write_is_not_read(bundle: Bundle) -> None:
    encode(bundle)
    file_of(bundle).chmod(0o666)
    with pytest.warns(RuntimeWarning, match="can be written by everybody"):
        assert encode(bundle).compiled == 1
    assert not file_of(bundle).stat().st_mode & stat.S_IWOTH


def test_a_link_is_not_followed(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"kernels")
    file_of(bundle).symlink_to(tmp_path / "elsewhere")
    with pytest.warns(RuntimeWarning, match="cannot be read"):
        assert encode(bundle).compiled == 1
    assert not file_of(bundle).is_symlink()


def test_what_cannot_be_written_costs_nothing(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    for function in ("tempfile.mkstemp", "os.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(f"diffveil.engines._kernel_cache.{function}", refuse)
            assert encode(bundle).compiled == 1
        assert not file_of(bundle).exists()
        assert not list(file_of(bundle).parent.glob(".kernels-*"))


@pytest.mark.parametrize("broken", ["create_runtime_cache", "set_runtime_cache", "serialize"])
def test_a_library_that_raises_keeps_nothing_and_computes_all_the_same(
    bundle: Bundle, broken: str
) -> None:
    encode(bundle, broken=broken)
    assert not file_of(bundle).exists()


def test_a_cache_that_the_library_cannot_read_is_passed_over(bundle: Bundle) -> None:
    encode(bundle)
    with pytest.warns(RuntimeWarning, match="passed over and compiled again"):
        assert encode(bundle, broken="deserialize").compiled == 1


def test_a_loop_gives_its_stream_back_whatever_is_kept(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = FakeDriver()
    trt = FakeTensorRT(driver)
    backend = TensorRT(
        driver=driver, import_module=lambda name: trt, find_gpu=lambda ordinal: TARGET
    )
    engine = backend.load(bundle, "encode")
    assert isinstance(engine, NativeEngine)

    def refuse() -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(engine, "_save_kernels", refuse)
    loop = engine.loop(1, ())
    assert not engine._lanes._free
    with pytest.raises(RuntimeError, match="no"):
        loop.close()
    assert len(engine._lanes._free) == 1
    engine.close()


def test_libraries_without_such_caches_go_without(bundle: Bundle) -> None:
    encode(bundle, rtx=False)
    assert not file_of(bundle).exists()
