"""Every program of the tiny bundle against PyTorch, on the engine that users run."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import pytest
import torch

from diffveil.bundle import Bundle
from diffveil.engines import ONNXRuntimeCPU, Programs
from diffveil.parity import TOLERANCES
from diffveil.programs import PROGRAMS
from diffveil_export.components import Components
from diffveil_export.storage import round_weights
from diffveil_export.verify import random_inputs
from diffveil_export.wrappers import wrap
from parity import assert_close_to_reference
from tiny_models import tiny_components


@pytest.fixture(scope="module")
def programs(tiny_bundle: Bundle) -> Iterator[Programs]:
    with Programs(tiny_bundle, ONNXRuntimeCPU(threads=1)) as opened:
        yield opened


@pytest.fixture(scope="module")
def components() -> Components:
    """The networks that the tiny bundle was exported from, weights rounded as there."""
    result = tiny_components()
    for module in result.modules().values():
        round_weights(module, "int8")
    return result


@pytest.mark.parametrize("batch", [1, 3, 4])
@pytest.mark.parametrize("name", PROGRAMS)
def test_program_is_as_exact_as_pytorch(
    name: str, batch: int, programs: Programs, components: Components
) -> None:
    spec = PROGRAMS[name]
    generator = torch.Generator().manual_seed(100 + batch)
    inputs = random_inputs(spec, components.dimensions, batch, generator)
    feed = {t.name: x.numpy() for t, x in zip(spec.inputs, inputs, strict=True)}
    outputs = programs.engine(name).run(**feed)
    actual = [outputs[t.name] for t in spec.outputs]
    assert_close_to_reference(wrap(components, name), inputs, actual)


def test_rows_of_a_batch_do_not_mix(programs: Programs, components: Components) -> None:
    spec = PROGRAMS["guide"]
    generator = torch.Generator().manual_seed(9)
    x0, anchor, repel, attract, sibling = (
        x.numpy() for x in random_inputs(spec, components.dimensions, 3, generator)
    )
    together, _, _ = programs.guide(
        x0=x0, anchor=anchor, repel=repel, attract=attract, sibling=sibling * 0
    )
    alone, _, _ = programs.guide(
        x0=x0[1:2],
        anchor=anchor[1:2],
        repel=repel[1:2],
        attract=attract[1:2],
        sibling=sibling[:1, :1],
    )
    difference = abs(together[1] - alone[0]).max()
    assert difference <= 1e-5 * abs(alone).max()


def test_lower_triangle_of_sibling_is_ignored(programs: Programs, components: Components) -> None:
    spec = PROGRAMS["guide"]
    generator = torch.Generator().manual_seed(10)
    inputs = random_inputs(spec, components.dimensions, 3, generator)
    feed = {t.name: x.numpy() for t, x in zip(spec.inputs, inputs, strict=True)}
    full = programs.guide(**feed)
    feed["sibling"] = inputs[4].triu(1).numpy()
    for a, b in zip(full, programs.guide(**feed), strict=True):
        assert (a == b).all()


def test_manifest_records_parity_within_tolerance(tiny_bundle: Bundle) -> None:
    for name, spec in PROGRAMS.items():
        rows = tiny_bundle.program(name).parity
        # Fresh inputs with one and three rows, after the golden inputs with one or two.
        for tensor in spec.outputs:
            golden, *fresh = (r.batch for r in rows if r.output == tensor.name)
            assert golden in (1, 2)
            assert fresh == [1, 3]
        assert all(0 <= r.max_rel <= TOLERANCES["float32"].max_rel for r in rows)


@pytest.mark.parametrize("name", PROGRAMS)
def test_graphs_are_valid_and_say_nothing_about_their_maker(name: str, tiny_bundle: Bundle) -> None:
    path = tiny_bundle.program_path(name)
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(str(path), load_external_data=False)
    assert not model.doc_string
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)
    raw = path.read_bytes()
    assert b"site-packages" not in raw
    assert b".py" not in raw
    assert "ConvTranspose" not in {node.op_type for node in model.graph.node}


def test_weights_are_stored_once(tiny_bundle: Bundle, components: Components) -> None:
    """`guide` runs decoder and recognizer forwards and backwards and adds no large weight."""
    large = sum(
        p.numel()
        for module in components.modules().values()
        for p in {id(p): p for p in module.parameters()}.values()
    )
    stored = tiny_bundle.manifest.files["weights.bin"].bytes
    # int8, plus float32 for what is small; the conditioner counts twice in `large`.
    assert stored < 1.25 * large
