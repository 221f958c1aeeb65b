"""ONNX Runtime on a GPU: its buffers and bindings on the CPU's memory, its providers as asked for.

No GPU takes part: sessions run on the CPU provider, through the very bindings that a GPU gets.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from diffveil.bundle import Bundle
from diffveil.engines import ONNXRuntimeCPU, Programs, bound, select_backend
from diffveil.engines.onnxrt_cuda import PROVIDERS, BoundEngine, ONNXRuntimeCUDA, Provider
from diffveil.errors import EngineError, OptionError


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Sessions run on the CPU and claim the providers that they were asked for."""
    asked: list[Any] = []
    session_class = ort.InferenceSession

    class Session:
        def __init__(self, path: str, sess_options: Any, providers: list[Any]) -> None:
            asked.append(providers)
            self._session = session_class(path, sess_options, ["CPUExecutionProvider"])
            self.claimed = [p if isinstance(p, str) else p[0] for p in providers]

        def get_providers(self) -> list[str]:
            return self.claimed

        def __getattr__(self, name: str) -> Any:
            return getattr(self._session, name)

    monkeypatch.setattr(ort, "InferenceSession", Session)
    return asked


def backend(**options: Any) -> ONNXRuntimeCUDA:
    made = ONNXRuntimeCUDA(1, **options)
    made._device = ("cpu", 0)
    return made


@pytest.fixture(params=["shared", "copied"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers that share the host's memory, or are copied to and from as a device's are."""
    if request.param == "copied":
        monkeypatch.setattr(bound, "CPU", ("nowhere", 0))


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_bound_calls_equal_plain_ones(
    cuda_graphs: bool, tiny_bundle: Bundle, asked: list[Any], rng: np.random.Generator
) -> None:
    engine = backend(cuda_graphs=cuda_graphs).load(tiny_bundle, "denoise")
    plain = ONNXRuntimeCPU(1).load(tiny_bundle, "denoise")
    assert isinstance(engine, BoundEngine)
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    for rows in (2, 1, 3, 2, 5, 6, 7, 1):  # more sizes than buffers are kept for
        feed = {
            "latent": rng.standard_normal((rows, 8, 4, 4)).astype(np.float32),
            "timestep": rng.integers(0, 1000, rows),
            "conditioning": rng.standard_normal((rows, 5, 24)).astype(np.float32),
        }
        kept.append((engine.run(**feed)["epsilon"], plain.run(**feed)["epsilon"]))
    for received, expected in kept:
        np.testing.assert_array_equal(received, expected)
    with pytest.raises(EngineError, match="was called wrongly"):
        engine.run(latent=np.zeros((1, 8, 4, 4), np.float32))
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.run(**feed)


@pytest.mark.usefixtures("memory", "asked")
def test_loops_carry_over_on_the_device(tiny_bundle: Bundle, rng: np.random.Generator) -> None:
    carry = (("epsilon", "latent"),)
    engine = backend().load(tiny_bundle, "denoise")
    assert isinstance(engine, BoundEngine)
    loop = engine.loop(2, carry)
    plain = ONNXRuntimeCPU(1).load(tiny_bundle, "denoise")
    x = rng.standard_normal((2, 8, 4, 4)).astype(np.float32)
    conditioning = rng.standard_normal((2, 5, 24)).astype(np.float32)
    loop.put(latent=x, conditioning=conditioning)
    for timestep in (900, 500, 100):
        t = np.full(2, timestep)
        loop.put(timestep=t)
        loop.step()
        x = plain.run(latent=x, timestep=t, conditioning=conditioning)["epsilon"]  # type: ignore[assignment]
        np.testing.assert_array_equal(loop.get("epsilon"), x)


@pytest.mark.usefixtures("asked")
def test_threads_get_buffers_of_their_own(tiny_bundle: Bundle, rng: np.random.Generator) -> None:
    engine = backend().load(tiny_bundle, "decode")
    plain = ONNXRuntimeCPU(1).load(tiny_bundle, "decode")
    latents = rng.standard_normal((8, 2, 8, 4, 4)).astype(np.float32)
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


def test_captured_calls_never_share_a_number(
    tiny_bundle: Bundle, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number's graph holds addresses: buffers that were made anew must not replay it."""
    numbers: list[str] = []

    class Options:
        def add_run_config_entry(self, key: str, value: str) -> None:
            assert key == "gpu_graph_id"
            numbers.append(value)

    engine = backend(cuda_graphs=True).load(tiny_bundle, "recognize")
    monkeypatch.setattr(ort, "RunOptions", Options)
    monkeypatch.setattr(
        "diffveil.engines.onnxrt_cuda._Binding.run", lambda self, inputs: {"embedding": None}
    )
    for rows in (1, 2, 3, 4, 5, 1, 1):
        engine.run(image=np.zeros((rows, 3, 32, 32), np.float32))
    assert len(numbers) == len(set(numbers)) == 6


@pytest.mark.parametrize("how", ["loop", "whole loop", "unbindable"])
def test_sessions_that_capture_take_one_call_at_a_time_and_capture_no_loop(
    how: str, tiny_bundle: Bundle, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Options:
        def add_run_config_entry(self, key: str, value: str) -> None:
            self.entry = (key, value)

    monkeypatch.setattr(ort, "RunOptions", Options)
    engine = backend(cuda_graphs=True).load(tiny_bundle, "recognize")
    assert isinstance(engine, BoundEngine)
    seen: list[tuple[str, str]] = []

    def run(*arguments: Any) -> Any:
        seen.append(arguments[-1].entry)
        others = threading.Thread(target=lambda: taken.append(engine._lock.acquire(timeout=0.05)))
        others.start()
        others.join()
        return [np.zeros((1, 20), np.float32)]

    taken: list[bool] = []
    image = np.zeros((1, 3, 32, 32), np.float32)
    monkeypatch.setattr(engine._session, "run", run, raising=False)
    monkeypatch.setattr(engine._session, "run_with_iobinding", run, raising=False)
    if how == "unbindable":
        engine._bindable = False
        engine.run(image=image)
    elif how == "loop":
        loop = engine.loop(1, ())
        loop.put(image=image)
        loop.step()
    else:
        whole = engine.join([], 1, {})
        assert whole is not None
        whole.put(image=image)
        whole.run({}, ["recognize"])
    assert seen == [("gpu_graph_id", "-1")]
    assert taken == [False]


@pytest.mark.parametrize("provider", list(PROVIDERS))
def test_providers_are_asked_in_order(
    provider: Provider, tiny_bundle: Bundle, asked: list[Any]
) -> None:
    made = backend(provider=provider, device=0, cuda_graphs=True, cache="kept", options={"x": "y"})
    made.load(tiny_bundle, "encode")
    (chain,) = asked
    names = [p if isinstance(p, str) else p[0] for p in chain]
    assert names[0] == PROVIDERS[provider]
    assert names[-1] == "CPUExecutionProvider"
    assert "CUDAExecutionProvider" in names
    first = chain[0][1]
    assert first["x"] == "y"
    assert "1" in {first.get("enable_cuda_graph"), first.get("trt_cuda_graph_enable")}
    cuda = dict(p for p in chain if not isinstance(p, str))["CUDAExecutionProvider"]
    assert cuda["use_tf32"] == "0"


def test_a_session_that_silently_took_the_cpu_is_refused(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ONNX Runtime does where CUDA's libraries are missing: log, and use the CPU."""
    session_class = ort.InferenceSession
    monkeypatch.setattr(
        ort,
        "InferenceSession",
        lambda path, sess_options, providers: session_class(
            path, sess_options, ["CPUExecutionProvider"]
        ),
    )
    with pytest.raises(EngineError, match=r"instead of CUDAExecutionProvider: the libraries"):
        backend().load(tiny_bundle, "encode")


def test_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    made = backend()
    assert "is built without CUDAExecutionProvider" in made.available().why
    monkeypatch.setattr(ort, "get_available_providers", lambda: list(PROVIDERS.values()))
    made._find_gpu = lambda ordinal: None
    assert "no NVIDIA GPU" in made.available().why
    made._find_gpu = lambda ordinal: "sm90"
    assert made.available()
    assert "sm90" in made.available().why


def test_options_are_checked() -> None:
    with pytest.raises(OptionError, match=r"threads.*provider.*device"):
        ONNXRuntimeCUDA(0, provider="abacus", device=-1)  # type: ignore[arg-type]
    assert "onnxruntime-cuda" in {r.name for r in select_backend().reasons}


@pytest.mark.usefixtures("asked")
def test_what_fails_on_the_device_is_an_engine_error(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(self: Any, inputs: Any) -> Any:
        raise RuntimeError("CUDA failure 2: out of memory")

    monkeypatch.setattr("diffveil.engines.onnxrt_cuda._Binding.run", exhausted)
    with (
        Programs(tiny_bundle, backend()) as programs,
        pytest.raises(EngineError, match="'encode' failed: CUDA failure 2"),
    ):
        programs.encode(image=np.zeros((1, 3, 32, 32), np.float32))
