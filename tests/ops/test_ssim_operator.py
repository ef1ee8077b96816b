"""Which variant of kernel SSIM runs where, and the torch operator: what torch's checks and its compiler make of it."""

import numpy as np
import pytest
import torch
from test_ssim_twin import off, weights

import pyprune as pp
from pyprune import machine
from pyprune.machine import Machine
from pyprune.ops import _cuda_ssim, _finite, _library
from pyprune.ops import ssim as op
from pyprune.ops.ssim import choose_ssim, kernel_ssim_statistics, ssim_variants
from tolerances import SSIM_GATE

CPU = ("cpu_baseline", "cpu_avx2")
LAYOUTS = (("cuda_thread", 4),)
HERE = choose_ssim((8, 4, 3, 3), "float32", "cpu", machine.this_machine())


@pytest.mark.parametrize(
    ("here", "device", "name"),
    [
        (Machine(CPU, LAYOUTS, "cuda"), "cpu", "cpu_avx2"),
        (Machine((), LAYOUTS, "cpu"), "cpu", "reference"),
        (Machine(CPU, LAYOUTS, "cuda"), "cuda", "cuda_tile"),
        (Machine(CPU, (), "cuda"), "cuda", "triton_tile"),
        (Machine(CPU, (), "cpu"), "cuda", "torch_chunked"),
        (Machine(CPU, LAYOUTS, "cuda"), "mps", "torch_chunked"),
    ],
)
def test_the_choice(here, device, name):
    assert choose_ssim((8, 4, 3, 3), "float32", device, here) == name
    assert name in ssim_variants(here, device)


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("cuda_tile", r"variant 'cuda_tile' is not usable: .*; here are auto, .*reference.*torch_chunked\."),
        ("cuda_tiles", r"variant 'cuda_tiles' is unknown; here are auto, .*torch_chunked\."),
        ("referense", r"is unknown; .* Did you mean 'reference'\?"),
    ],
)
def test_a_variant_that_cannot_run(variant, message, monkeypatch):
    monkeypatch.setattr(machine, "this_machine", lambda gpu=0: Machine(CPU))
    for run in (pp.kernel_ssim, kernel_ssim_statistics):
        with pytest.raises(ValueError, match=message):
            run(weights(3, 2, 3, 3), variant=variant)


def test_a_variant_for_another_device(monkeypatch):
    monkeypatch.setattr(machine, "this_machine", lambda gpu=0: Machine(CPU, LAYOUTS, "cuda"))
    for variant in ("cuda_tile", "triton_tile"):
        with pytest.raises(
            ValueError, match=rf"'{variant}' takes weights on a GPU; these are in host memory. Pass w.to\('cuda'\)"
        ):
            pp.kernel_ssim(weights(3, 2, 3, 3), variant=variant)
    with pytest.raises(ValueError, match=r"'reference' takes weights in host memory; these are on cuda. Pass w.to"):
        op._resolve("reference", (3, 2, 3, 3), "float32", "cuda", machine.this_machine())


def test_the_way_of_gpu_weights(monkeypatch):
    """The kernels' twin stands in for the GPU: what is passed on is what the kernels take."""
    w = weights(20, 5, 3, 3)
    monkeypatch.setattr(op, "_prepare", lambda w, variant: ("cuda_tile", False))
    psi, name = op._run(w, op.Constants())
    assert name == "cuda_tile"
    assert off(psi, w) <= SSIM_GATE
    found = kernel_ssim_statistics(w.double(), thresholds=(0.2, 0.4), bins=10, top=4, nearest=True)
    assert found.variant == "cuda_tile"
    assert found.top.psi.dtype == found.nearest.psi.dtype == np.float64
    values = psi.numpy()[np.triu_indices(20, 1)]
    assert found.counts.tolist() == [(values > 0.2).sum(), (values > 0.4).sum()]
    assert found.top.psi == pytest.approx(np.sort(values)[::-1][:4], abs=SSIM_GATE)
    assert (found.top.i[0], found.top.j[0]) == (0, 1)
    assert found.nearest.index[:2].tolist() == [1, 0]


def test_many_layers_are_as_each_alone(monkeypatch):
    layers = [weights(9, 3, 3, 3), weights(70, 5, 1, 2, torch.float64), weights(12, 2, 5, 5)]
    options = {"thresholds": (0.2, 0.5), "bins": 7, "top": 3, "nearest": True, "eps": 1e-3}
    natively = op.layer_statistics(layers, **options)
    monkeypatch.setattr(op, "_prepare", lambda w, variant: ("cuda_tile", False))
    together = op.layer_statistics(layers, **options)
    for w, one, native in zip(layers, together, natively, strict=True):
        alone = kernel_ssim_statistics(w, **options)
        assert (one.variant, native.variant == HERE) == ("cuda_tile", True)
        assert (one.pairs, one.mean) == (alone.pairs, alone.mean)
        assert one.histogram.tolist() == alone.histogram.tolist()
        assert one.top.psi.dtype == (np.float64 if w.dtype == torch.float64 else np.float32)
        assert one.nearest.index.tolist() == alone.nearest.index.tolist()
        assert one.mean == pytest.approx(native.mean, abs=SSIM_GATE)
        assert np.abs(one.counts - native.counts).max() <= 1
    assert op.layer_statistics([]) == []
    with pytest.raises(TypeError, match="w must be a torch tensor"):
        op.layer_statistics([layers[0], None])


def test_what_a_gpu_counts_is_raised_later(monkeypatch):
    monkeypatch.setattr(_finite, "_counters", {})
    monkeypatch.setattr(_finite, "_raised", {})
    monkeypatch.setattr(_finite, "_pinned", lambda: torch.zeros(1, dtype=torch.int64))
    device = torch.device("cuda", 0)
    w = weights(5, 2, 3, 3)
    w[1, 1, 1, 1] = torch.nan
    _cuda_ssim.matrices([w], [(0.1, 1, 1, 1e-2, None)], _finite.counter(device, "kernel_ssim"))
    with pytest.raises(ValueError, match="kernel_ssim: weights must be finite; 1 of those compared before on cuda:0"):
        _finite.poll(device)
    _finite.poll()
    assert _finite.counter(device) is not _finite.counter(device, "kernel_ssim")


WEIGHTS = {
    "plain": lambda: weights(7, 3, 3, 3),
    "one filter": lambda: weights(1, 3, 3, 3),
    "channels last": lambda: weights(6, 3, 3, 3).to(memory_format=torch.channels_last),
    "float64": lambda: weights(5, 3, 2, 2, torch.float64),
    "bfloat16": lambda: weights(5, 3, 2, 2, torch.bfloat16),
    "requires grad": lambda: weights(5, 3, 3, 3).requires_grad_(),
}


@pytest.mark.parametrize("options", [{}, {"eps_absolute": 1e-4}, {"variant": "torch_chunked"}], ids=str)
@pytest.mark.parametrize("w", WEIGHTS)
def test_torch_finds_the_operator_sound(w, options):
    tests = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    found = torch.library.opcheck(_library.kernel_ssim, (WEIGHTS[w]().detach(),), options, test_utils=tests)
    assert set(found.values()) == {"SUCCESS"}


def test_psi_carries_no_gradient():
    assert not pp.kernel_ssim(WEIGHTS["requires grad"]()).requires_grad


def test_compiled_in_one_graph_for_any_shape():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def redundant(w):
        return (pp.kernel_ssim(2 * w, eps=1e-3) > 0.5).sum()

    compiled = torch.compile(redundant, fullgraph=True, dynamic=True, backend=backend)
    for shape in [(9, 4, 3, 5), (12, 5, 4, 3), (7, 3, 2, 6)]:
        w = weights(*shape)
        assert compiled(w) == redundant(w)
    assert len(graphs) == 1
    assert "torch.ops.pyprune.kernel_ssim.default" in graphs[0].code


def test_compiled_code_refuses_what_eager_code_refuses():
    compiled = torch.compile(pp.kernel_ssim, fullgraph=True, backend="aot_eager")
    w = weights(5, 3, 3, 3)
    w[0, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="weights must be finite; 1 of 135"):
        compiled(w)
    for bad, message in [
        (w[0], r"must be \[F2, F1, K1, K2\]"),
        (w.long(), "weights must be float16"),
        (w[:0], "empty"),
    ]:
        with pytest.raises(Exception, match=message):
            compiled(bad)
    with pytest.raises(Exception, match="eps must be positive"):
        torch.compile(lambda w: pp.kernel_ssim(w, eps=0.0), fullgraph=True, backend="aot_eager")(w)


class Foreign:
    """An array of another library, as far as DLPack knows."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


def test_arrays_of_other_libraries():
    w = weights(9, 3, 3, 3)
    want = pp.kernel_ssim(w).numpy()
    assert (np.asarray(pp.kernel_ssim(Foreign(w))) == want).all()
    found = kernel_ssim_statistics(Foreign(w), thresholds=(0.3,))
    assert found.counts.tolist() == [(want[np.triu_indices(9, 1)] > 0.3).sum()]
    for run in (pp.kernel_ssim, kernel_ssim_statistics):
        with pytest.raises(
            TypeError, match="must be a torch tensor, a numpy array or have __dlpack__; got <class 'list'>"
        ):
            run([[1.0]])
