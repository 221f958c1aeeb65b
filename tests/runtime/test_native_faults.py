"""Native engines that fail: a fake driver and library report errors, and raise them."""

from __future__ import annotations

from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest

from diffveil.bundle import Bundle
from diffveil.engines import BackendWarning, ONNXRuntimeCPU, Programs, TensorRT, WholeLoop
from diffveil.errors import EngineError
from diffveil.golden import judge_for
from diffveil.noise import NoiseKey
from diffveil.operations import FaceOperations
from fake_cuda import Status
from fake_machine import PLAN, Machine, crops, driver_functions, step_inputs
from fake_trt_runtime import TARGET

FAULTS = {
    "cuMemAlloc": Status.CUDA_ERROR_OUT_OF_MEMORY,
    "cuMemHostAlloc": Status.CUDA_ERROR_OUT_OF_MEMORY,
    "cuStreamCreate": Status.CUDA_ERROR_OUT_OF_MEMORY,
    "cuMemcpyHtoDAsync": Status.CUDA_ERROR_ILLEGAL_ADDRESS,
    "cuMemcpyDtoHAsync": Status.CUDA_ERROR_ILLEGAL_ADDRESS,
    "cuStreamSynchronize": Status.CUDA_ERROR_ILLEGAL_ADDRESS,
    "cuStreamBeginCapture": Status.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
    "cuStreamEndCapture": Status.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
    "cuGraphInstantiate": Status.CUDA_ERROR_OUT_OF_MEMORY,
    "cuGraphLaunch": Status.CUDA_ERROR_ILLEGAL_ADDRESS,
}


@pytest.mark.parametrize("function", FAULTS)
def test_whatever_the_driver_refuses_the_next_backend_takes_over(
    function: str, engines: Bundle, rng: np.random.Generator
) -> None:
    machine, cpu = Machine(), ONNXRuntimeCPU(1)
    plan, keys = PLAN, [NoiseKey.from_seed(0)]
    image = crops(rng, 1)
    with Programs(engines, cpu) as programs:
        expected = FaceOperations(programs).anonymize(image, plan, keys=keys)
    with Programs(engines, machine.backend, others=[cpu]) as programs:
        operations = FaceOperations(programs)
        if function != "cuStreamCreate":
            operations.anonymize(image, plan, keys=keys)
        machine.driver.fail[function] = FAULTS[function]
        with pytest.warns(
            BackendWarning, match=f"CUDA: {function} reports {FAULTS[function].name}"
        ):
            received = operations.anonymize(crops(rng, 2), plan, keys=keys * 2)
        assert received.shape[0] == 2
        assert programs.backend is cpu
        np.testing.assert_array_equal(operations.anonymize(image, plan, keys=keys), expected)


def test_a_folder_that_an_uninstalled_library_left_is_no_library() -> None:
    backend = TensorRT(
        import_module=lambda name: SimpleNamespace(), find_gpu=lambda ordinal: TARGET
    )
    assert "cannot be imported" in backend.available().why


FREEING = {"cuMemFree", "cuMemFreeHost", "cuStreamDestroy", "cuGraphExecDestroy"}
MEASURING = {"cuMemGetInfo", "cuEventCreate", "cuEventRecord", "cuEventElapsedTime"}
MEASURING |= {"cuEventDestroy"}


def falls_back(engines: Bundle, machine: Machine, image: np.ndarray, match: str) -> None:
    """A call that fails when it warms up or is captured is answered by the next backend."""
    cpu = ONNXRuntimeCPU(1)
    expected = cpu.load(engines, "recognize").run(image=image)["embedding"]
    with Programs(engines, machine.backend, others=[cpu]) as programs:
        with pytest.warns(BackendWarning, match=match) as caught:
            results = [programs.recognize(image=image) for _ in range(2)]
        assert len(caught) == 1
        assert programs.backend is cpu
    for result in results:
        np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("function", sorted(driver_functions() - FREEING - MEASURING))
@pytest.mark.parametrize("raises", [False, True])
def test_every_function_of_the_driver_may_fail(
    raises: bool, function: str, engines: Bundle, rng: np.random.Generator
) -> None:
    """Reporting an error, or raising one, as the bindings do for what an old driver lacks."""
    machine = Machine()
    missing = RuntimeError(f"Function {function} not found")
    machine.driver.fail[function] = missing if raises else Status.CUDA_ERROR_INVALID_VALUE
    falls_back(engines, machine, crops(rng, 1), function)


def test_what_cannot_be_freed_is_no_error(engines: Bundle, rng: np.random.Generator) -> None:
    machine = Machine()
    for function in FREEING:
        machine.driver.fail[function] = RuntimeError(f"Function {function} not found")
    image = crops(rng, 1)
    with Programs(engines, machine.backend) as programs:
        results = [programs.recognize(image=image) for _ in range(3)]
        np.testing.assert_array_equal(results[2], results[0])


RAISING = [
    *("Runtime", "deserialize_cuda_engine", "device_memory_size_v2", "create_runtime_config"),
    *("create_execution_context", "set_input_shape", "set_device_memory", "set_tensor_address"),
    *("execute_async_v3", "is_stream_capturable", "update_device_memory_size_for_shapes"),
]


@pytest.mark.parametrize("function", RAISING)
def test_whatever_the_library_raises_the_next_backend_takes_over(
    function: str, engines: Bundle, rng: np.random.Generator
) -> None:
    machine = Machine()
    machine.trt.by_shapes = function != "device_memory_size_v2"
    machine.trt.raises.add(function)
    falls_back(engines, machine, crops(rng, 1), f"'recognize'.*{function} is broken")


@pytest.mark.parametrize("function", ["create_execution_context", "execute_async_v3"])
def test_what_the_library_raises_is_an_engine_error_in_loops_and_verdicts(
    function: str, engines: Bundle, rng: np.random.Generator
) -> None:
    machine = Machine()

    def once() -> None:
        loop = programs.step_loop(1)
        assert isinstance(loop, WholeLoop)
        with closing(loop):
            loop.put(**step_inputs(rng, 1))
            loop.step()

    with Programs(engines, machine.backend) as programs:
        machine.trt.raises.add(function)
        with pytest.raises(EngineError, match=f"'step'.*{function} is broken"):
            once()
        verdict = judge_for(engines)(machine.backend)
        assert not verdict
        assert f"{function} is broken" in verdict.why


def test_a_failed_loop_gives_its_stream_back(engines: Bundle, rng: np.random.Generator) -> None:
    machine = Machine(streams=1)
    plan, keys = PLAN, [NoiseKey.from_seed(0)]
    with Programs(engines, machine.backend) as programs:
        operations = FaceOperations(programs)
        batch = operations.prepare(crops(rng, 1))
        machine.driver.fail["cuMemcpyHtoDAsync"] = Status.CUDA_ERROR_ILLEGAL_ADDRESS
        for _ in range(3):
            with pytest.raises(EngineError, match="ILLEGAL_ADDRESS"):
                operations.anonymize(batch, plan, keys=keys)
        del machine.driver.fail["cuMemcpyHtoDAsync"]
        operations.anonymize(batch, plan, keys=keys)
