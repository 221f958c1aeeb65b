"""Native engines: loops, buffers, streams, graphs and what they share, on a fake device.

The device's memory is the host's and ONNX Runtime computes, so results are real; that a GPU and
TensorRT behave as their documents say is for a GPU to show.
"""

from __future__ import annotations

import gc
import importlib
import shutil
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import diffveil.engines._cuda as cuda
from diffveil.batching import MAX_BATCH
from diffveil.bundle import Bundle
from diffveil.engines import ONNXRuntimeCPU, Programs, TensorRT, WholeLoop
from diffveil.errors import BackendUnavailableError, EngineError, OptionError
from diffveil.golden import require_golden
from diffveil.noise import NoiseKey
from diffveil.operations import FaceOperations
from diffveil.protector import Protector
from fake_cuda import FakeDriver, Status
from fake_machine import PLAN, Machine, crops, driver_functions, step_inputs
from fake_trt_runtime import TARGET, FakeTensorRT, write_engines


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    gc.collect()
    assert machine.driver.used == 0, "device memory is left over"
    assert not machine.driver.pinned
    assert not machine.driver.graphs
    assert not machine.driver.executables
    assert not machine.driver.queues


def test_every_program_computes_what_it_should(engines: Bundle, machine: Machine) -> None:
    require_golden(engines, machine.backend)
    assert machine.trt.engines == len(engines.manifest.programs)


def test_calls_of_all_sizes_equal_onnx_runtimes(
    engines: Bundle, machine: Machine, rng: np.random.Generator
) -> None:
    engine = machine.backend.load(engines, "decode")
    plain = ONNXRuntimeCPU(1).load(engines, "decode")
    kept = []
    for rows in (2, 1, 2, 2, 8, 3, 4, 5, 2, 1, 1):
        latent = rng.standard_normal((rows, 8, 4, 4)).astype(np.float32)
        kept.append((engine.run(latent=latent)["image"], plain.run(latent=latent)["image"]))
    for received, expected in kept:
        np.testing.assert_array_equal(received, expected)
    engine.close()


def test_a_call_is_captured_once_and_waits_once(
    engines: Bundle, machine: Machine, rng: np.random.Generator
) -> None:
    engine = machine.backend.load(engines, "recognize")
    for _ in range(6):
        engine.run(image=crops(rng, 2))
    assert machine.count("cuStreamBeginCapture") == 1
    assert machine.count("cuGraphLaunch") == 5
    # The first call also waits before it takes activation memory.
    assert machine.count("cuStreamSynchronize") == 6 + 1
    assert machine.count("cuMemAlloc") == 3
    engine.close()


def test_a_graph_is_dropped_when_activation_memory_moves(
    engines: Bundle, machine: Machine, rng: np.random.Generator
) -> None:
    """A larger program takes larger memory; graphs of smaller ones hold the old address."""
    with Programs(engines, machine.backend) as programs:
        plain = Programs(engines, ONNXRuntimeCPU(1))
        image = crops(rng, 2)
        for _ in range(3):
            first = programs.encode(image=image)
        latent = rng.standard_normal((2, 8, 4, 4)).astype(np.float32)
        programs.decode(latent=latent)
        np.testing.assert_array_equal(programs.encode(image=image), first)
        np.testing.assert_array_equal(programs.encode(image=image), plain.encode(image=image))
        assert machine.count("cuGraphInstantiate") == 2


def test_programs_share_one_activation_memory(
    engines: Bundle, machine: Machine, rng: np.random.Generator
) -> None:
    with Programs(engines, machine.backend) as programs:
        image = crops(rng, 1)
        programs.recognize(image=image)
        before = machine.driver.used
        programs.encode(image=image)
        programs.embed(image=image)
        # encode and embed need less than recognize: only their own tensors are added.
        tensors = 2 * image.nbytes + 4 * (8 * 4 * 4 + 10 * 24)
        assert machine.driver.used - before == tensors


@pytest.mark.parametrize("by_shapes", [True, False])
def test_activation_memory_is_what_the_rows_of_a_call_need(
    by_shapes: bool, engines: Bundle, machine: Machine, rng: np.random.Generator
) -> None:
    """Where the library can say; elsewhere what the largest batch needs."""
    machine.trt.by_shapes = by_shapes
    engine = machine.backend.load(engines, "recognize")
    whole = 4096 * (1 + list(engines.manifest.programs).index("recognize"))
    tensors = 0
    for rows in (1, 3, 8):
        for _ in range(3):
            image = crops(rng, rows)
            engine.run(image=image)
        tensors += image.nbytes + rows * 20 * 4
        assert machine.driver.used == tensors + (whole * rows // 8 if by_shapes else whole)
    engine.close()


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_loop_equals_the_one_on_the_cpu(
    graphs: bool, rows: int, engines: Bundle, rng: np.random.Generator
) -> None:
    machine = Machine(cuda_graphs=graphs)
    noise = [NoiseKey.from_seed(i) for i in range(rows)]
    plan = PLAN
    with (
        Programs(engines, machine.backend) as native,
        Programs(engines, ONNXRuntimeCPU(1)) as plain,
    ):
        for _ in range(3):  # warm up, capture, replay
            images = crops(rng, rows)
            received, expected = (
                FaceOperations(programs).anonymize(images, plan, keys=noise)
                for programs in (native, plain)
            )
            np.testing.assert_allclose(received, expected, rtol=0, atol=1e-4)
    assert (machine.count("cuGraphLaunch") > 0) == graphs


def test_a_whole_loop_is_one_graph_and_never_waits(
    engines: Bundle, machine: Machine, rng: np.random.Generator
) -> None:
    """One wait a loop, to read its result; the same loop again is one launch."""
    plan, keys = PLAN, [NoiseKey.from_seed(0)]
    with Programs(engines, machine.backend) as programs:
        operations = FaceOperations(programs)
        steps = len(plan.table(operations.schedule).steps)
        assert steps > 4
        waits, launches, done = [], [], []
        for _ in range(4):
            batch = operations.prepare(crops(rng, 1))
            _ = batch.latents, batch.tokens, batch.identities
            before = machine.count("cuStreamSynchronize"), machine.count("cuGraphLaunch")
            operations.anonymize(batch, plan, keys=keys, progress=lambda i, n: done.append((i, n)))
            waits.append(machine.count("cuStreamSynchronize") - before[0])
            launches.append(machine.count("cuGraphLaunch") - before[1])
        retracing = steps  # starts from the photo's own noise: ordinary calls of denoise
        # Beside these: expand and decode once each, and the loop's result and its end.
        assert waits[-1] <= retracing + 2 + 2
        assert launches[-1] == retracing + 2 + 1
        assert done[:steps] == [(i + 1, steps) for i in range(steps)]


def test_a_handed_over_loop_equals_single_steps(
    engines: Bundle, machine: Machine, rng: np.random.Generator
) -> None:
    """The same values put step by step and handed over at once, three times each."""
    from diffveil.engines import Scheduled

    still = step_inputs(rng, 2)
    for name in ("timestep", "coefficients"):
        del still[name]
    times = (np.full(2, 900), np.full(2, 300))
    coefficients = tuple(rng.uniform(0, 0.5, (2, 8)).astype(np.float32) for _ in range(3))
    orders = {"timestep": (0, 0, 1, 1, 0), "coefficients": (0, 1, 2, 1, 0)}
    values = {"timestep": times, "coefficients": coefficients}
    with Programs(engines, machine.backend) as programs:
        loop = programs.step_loop(2)
        assert isinstance(loop, WholeLoop)
        loop.put(**still)
        for i in range(5):
            loop.put(**{name: values[name][orders[name][i]] for name in orders})
            loop.step()
        expected = {name: loop.get(name) for name in ("next", "epsilon", "embedding")}
        loop.close()
        schedule = {name: Scheduled(values[name], orders[name]) for name in orders}
        for _ in range(3):
            again = programs.step_loop(2)
            assert isinstance(again, WholeLoop)
            again.put(**still)
            again.run(schedule, ["step"] * 5)
            for name, array in expected.items():
                np.testing.assert_array_equal(again.get(name), array)
            with pytest.raises(EngineError, match="lacks"):
                again.run(schedule, ["step"] * 5)  # what was carried over is gone
            again.close()
        third = programs.step_loop(2)
        assert isinstance(third, WholeLoop)
        third.put(**still)
        wrong = {**schedule, "timestep": Scheduled((np.zeros(3, np.int64),), (0,))}
        with pytest.raises(EngineError, match=r"fed wrongly: timestep: received"):
            third.run(wrong, ["step"])
        third.close()


def test_a_kept_loop_is_not_used_for_other_carries(
    engines: Bundle, machine: Machine, rng: np.random.Generator
) -> None:
    engine: Any = machine.backend.load(engines, "denoise")
    feed = {name: step_inputs(rng, 2)[name] for name in ("latent", "timestep", "conditioning")}
    expected = ONNXRuntimeCPU(1).load(engines, "denoise").run(**feed)["epsilon"]
    for carry in ((("epsilon", "latent"),), ()):
        with closing(engine.loop(2, carry)) as loop:
            loop.put(**feed)
            loop.step()
            np.testing.assert_array_equal(loop.get("epsilon"), expected)
            loop.step()
            assert np.array_equal(loop.get("epsilon"), expected) == (not carry)
    engine.close()


@pytest.mark.parametrize("capturable", [None, False])
def test_libraries_that_cannot_say_and_those_that_say_no(
    capturable: bool | None, engines: Bundle, machine: Machine, rng: np.random.Generator
) -> None:
    machine.trt.capturable = capturable
    engine = machine.backend.load(engines, "recognize")
    image = crops(rng, 1)
    results = [engine.run(image=image)["embedding"] for _ in range(3)]
    assert all(np.array_equal(r, results[0]) for r in results)
    assert (machine.count("cuGraphLaunch") > 0) == (capturable is None)
    engine.close()


def test_concurrent_calls_have_streams_of_their_own(
    engines: Bundle, machine: Machine, rng: np.random.Generator
) -> None:
    engine = machine.backend.load(engines, "decode")
    plain = ONNXRuntimeCPU(1).load(engines, "decode")
    latents = rng.standard_normal((12, 2, 8, 4, 4)).astype(np.float32)
    results: dict[int, np.ndarray] = {}

    def work(start: int) -> None:
        for i in range(start, len(latents), 4):
            results[i] = engine.run(latent=latents[i])["image"]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, latent in enumerate(latents):
        np.testing.assert_array_equal(results[i], plain.run(latent=latent)["image"])
    assert machine.count("cuStreamCreate") <= 2
    engine.close()


def test_engines_say_which_batches_they_take(
    engines: Bundle, machine: Machine, rng: np.random.Generator
) -> None:
    engine = machine.backend.load(engines, "encode")
    with pytest.raises(EngineError, match="takes 1 to 8 rows, received 9"):
        engine.run(image=crops(rng, 9))
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.run(image=crops(rng, 1))
    protector = Protector(Programs(engines, machine.backend))
    assert protector.operations.max_batch == 8 < MAX_BATCH
    assert protector.operations.embed(crops(rng, 9)).shape == (9, 20)
    protector.close()


def test_two_parts_take_turns_on_one_stream(engines: Bundle, rng: np.random.Generator) -> None:
    """More faces than a call takes, and a stream that only one loop can have."""
    machine, plan = Machine(streams=1), PLAN
    keys = [NoiseKey.from_seed(i) for i in range(3)]
    images = crops(rng, 3)
    results = []
    for backend in (machine.backend, ONNXRuntimeCPU(1)):
        with Programs(engines, backend) as programs:
            results.append(FaceOperations(programs, max_batch=2).anonymize(images, plan, keys=keys))
    np.testing.assert_allclose(*results, rtol=0, atol=1e-4)


def test_it_says_what_is_missing(tiny_bundle: Bundle, engines: Bundle, machine: Machine) -> None:
    assert machine.backend.available().why == f"tensorrt-rtx 9.9.9 on {TARGET}"
    assert machine.backend.ready(engines)
    assert "run `diffveil build" in machine.backend.ready(tiny_bundle).why

    def gone(name: str) -> None:
        raise ImportError(f"no module named {name}")

    absent = TensorRT("tensorrt", import_module=gone, find_gpu=lambda ordinal: TARGET)
    assert "pip install 'diffveil[tensorrt]'" in absent.available().why
    assert not absent.ready(engines)
    with pytest.raises(BackendUnavailableError, match="tensorrt cannot be imported"):
        absent.load(engines, "encode")
    nowhere = TensorRT(import_module=lambda name: machine.trt, driver=machine.driver)
    nowhere._find_gpu = lambda ordinal: None
    assert "no NVIDIA GPU" in nowhere.available().why
    with pytest.raises(BackendUnavailableError, match="no NVIDIA GPU"):
        nowhere.load(engines, "encode")
    with pytest.raises(OptionError, match=r"name.*device.*streams"):
        TensorRT("abacus", device=-1, streams=0)


def test_what_the_library_refuses_is_said_in_its_words(engines: Bundle, machine: Machine) -> None:
    machine.trt.refuse = "The engine plan file is not compatible with this version"
    with pytest.raises(EngineError, match="refuses the engine: The engine plan file"):
        machine.backend.load(engines, "encode")


def test_an_engine_is_hashed_once(
    engines: Bundle, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    monkeypatch.setattr("diffveil.engines.records._hash", lambda stream: read.append("twice"))
    machine.backend.load(engines, "encode").close()
    assert not read


def test_a_damaged_engine_is_refused(own_engines: Bundle, machine: Machine) -> None:
    folder = write_engines(own_engines, programs=("encode",))
    data = (folder / "encode.engine").read_bytes()
    (folder / "encode.engine").write_bytes(data[:-1] + b" ")
    with pytest.raises(EngineError, match="differs from its record: sha256"):
        machine.backend.load(own_engines, "encode")


@pytest.fixture
def own_engines(engines: Bundle, tmp_path: Path) -> Bundle:
    """A copy that may be changed, without engines."""
    folder = tmp_path / "bundle"
    shutil.copytree(engines.path, folder, ignore=shutil.ignore_patterns("engines"))
    return Bundle.load(folder)


def test_engines_without_weights_are_filled_from_the_bundle(
    own_engines: Bundle, machine: Machine, rng: np.random.Generator
) -> None:
    write_engines(own_engines, stripped=True, programs=("recognize",))
    machine.trt.raises.add("Refitter")
    with pytest.raises(EngineError, match=r"'recognize': tensorrt-rtx cannot load .*is broken"):
        machine.backend.load(own_engines, "recognize")
    machine.trt.raises.clear()
    engine = machine.backend.load(own_engines, "recognize")
    assert machine.trt.refitted == ["recognize.onnx"]
    image = crops(rng, 2)
    expected = ONNXRuntimeCPU(1).load(own_engines, "recognize").run(image=image)
    np.testing.assert_array_equal(engine.run(image=image)["embedding"], expected["embedding"])
    engine.close()
    machine.trt.refit_fails = True
    with pytest.raises(EngineError, match=r"cannot fill the engine .* weights 'w' not found"):
        machine.backend.load(own_engines, "recognize")


def test_tensorrt_shares_the_code(own_engines: Bundle, rng: np.random.Generator) -> None:
    machine = Machine(name="tensorrt")
    machine.trt = FakeTensorRT(machine.driver, rtx=False)
    write_engines(own_engines, "tensorrt", programs=("encode",))
    engine = machine.backend.load(own_engines, "encode")
    image = crops(rng, 1)
    expected = ONNXRuntimeCPU(1).load(own_engines, "encode").run(image=image)
    np.testing.assert_array_equal(engine.run(image=image)["latent"], expected["latent"])
    engine.close()


def test_the_real_bindings_have_every_name_that_is_called() -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    functions = driver_functions()
    assert len(functions) > 20
    assert all(callable(getattr(driver, name)) for name in functions)
    assert driver.CUstream_flags.CU_STREAM_NON_BLOCKING is not None
    assert driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL is not None
    assert functions <= {name for name in dir(FakeDriver) if name.startswith("cu")}


def test_the_real_library_has_every_name_that_is_called() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    for owner, names in {
        trt.Runtime: ("deserialize_cuda_engine",),
        trt.ICudaEngine: (
            "create_execution_context",
            "create_runtime_config",
            "device_memory_size_v2",
        ),
        trt.IExecutionContext: (
            "set_input_shape",
            "set_tensor_address",
            "set_device_memory",
            "execute_async_v3",
            "is_stream_capturable",
            "update_device_memory_size_for_shapes",
        ),
        trt.IRuntimeConfig: (
            "set_execution_context_allocation_strategy",
            "dynamic_shapes_kernel_specialization_strategy",
            "create_runtime_cache",
            "set_runtime_cache",
        ),
        trt.IRuntimeCache: ("serialize", "deserialize"),
        trt.OnnxParserRefitter: ("refit_from_file",),
        trt.Refitter: ("refit_cuda_engine",),
    }.items():
        assert all(hasattr(owner, name) for name in names), owner
    assert trt.ExecutionContextAllocationStrategy.USER_MANAGED is not None
    assert trt.DynamicShapesKernelSpecializationStrategy.EAGER is not None


def test_without_a_driver_the_way_out_is_named() -> None:
    try:
        importlib.import_module("cuda.bindings.driver")
    except ImportError:
        with pytest.raises(BackendUnavailableError, match="cuda-bindings cannot be imported"):
            cuda.Device()
    else:
        driver = FakeDriver()
        driver.fail["cuInit"] = Status.CUDA_ERROR_INVALID_VALUE
        with pytest.raises(BackendUnavailableError, match="no driver of an NVIDIA GPU"):
            cuda.Device(driver=driver)


def test_the_device_tells_about_itself() -> None:
    device = cuda.Device(driver=FakeDriver(total=1 << 20))
    assert (device.name, device.driver_version) == ("A fake GPU", "13.2")
    memory = device.memory(1 << 19)
    assert device.free_and_total() == (1 << 19, 1 << 20)
    with pytest.raises(EngineError, match="OUT_OF_MEMORY; give max_memory"):
        device.memory(1 << 20)
    memory.close()
    stream = device.stream()
    first, second = stream.event(), stream.event()
    assert second.milliseconds_since(first) > 0
