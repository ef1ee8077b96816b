"""The torch operators: what torch's own checks, the compiler, export, vmap and autocast make of them."""

import subprocess
import sys
import textwrap

import pytest
import torch

import pyprune as pp
from pyprune.ops import _library, _reference

OPTIONS = [{}, {"rtol": 1e-3}, {"check": False}, {"variant": "torch_svd"}]
MAPS = {
    "plain": lambda: torch.randn(3, 2, 5, 4).relu(),
    "one map": lambda: torch.randn(4, 4),
    "no map": lambda: torch.randn(0, 4, 4),
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "float64": lambda: torch.randn(2, 4, 4, dtype=torch.float64),
    "bfloat16": lambda: torch.randn(2, 4, 4).bfloat16(),
    "requires grad": lambda: torch.randn(2, 4, 4, requires_grad=True),
}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("maps", MAPS)
def test_torch_finds_the_operator_sound(maps, options):
    found = torch.library.opcheck(_library.matrix_rank, (MAPS[maps](),), options)
    assert set(found.values()) == {"SUCCESS"}


def test_opcheck_would_see_a_wrong_fake():
    def fake(x, rtol=None, check=True, variant="auto"):
        return x.new_empty(x.shape[:-1], dtype=torch.int32)

    wrong = _library.operator("wrong_rank(Tensor x) -> Tensor", lambda x: _library.matrix_rank(x), fake)
    with pytest.raises(torch.testing._internal.optests.OpCheckError, match="Shapes"):
        torch.library.opcheck(wrong, (torch.randn(2, 4, 4),), test_utils="test_faketensor")


def _twice(x):
    return 2 * pp.matrix_rank(x.relu())


def test_compiled_in_one_graph_for_any_shape():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(_twice, fullgraph=True, dynamic=True, backend=backend)
    for shape in [(4, 3, 8, 7), (5, 2, 9, 8), (2, 7, 5, 5)]:
        maps = torch.randn(shape)
        assert torch.equal(compiled(maps), _twice(maps))
    assert len(graphs) == 1
    assert "torch.ops.pyprune.matrix_rank.default" in graphs[0].code


def test_compiled_code_refuses_what_eager_code_refuses():
    compiled = torch.compile(_twice, fullgraph=True, backend="aot_eager")
    maps = torch.randn(3, 4, 4)
    maps[1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match="maps must be finite; 1 of 3 hold NaN or infinity"):
        compiled(maps)
    unchecked = torch.compile(lambda x: pp.matrix_rank(x, check=False), fullgraph=True, backend="aot_eager")
    assert unchecked(maps).tolist() == [4, -1, 4]
    unknown = torch.compile(lambda x: pp.matrix_rank(x, variant="cpu_mmx"), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="variant 'cpu_mmx' is unknown"):
        unknown(maps)
    with pytest.raises(Exception, match="maps must be float16, bfloat16, float32, float64; got int64"):
        unchecked(torch.ones(3, 3, dtype=torch.int64))


@pytest.mark.slow
def test_the_first_call_of_a_process_may_be_a_compiled_one():
    done = _python("""
        import torch, pyprune as pp
        compiled = torch.compile(lambda x: pp.matrix_rank(x.relu()) + 1, fullgraph=True)
        print(compiled(torch.eye(5).repeat(2, 1, 1)).tolist())
    """)
    assert done.stdout.strip() == "[6, 6]", done.stderr


def test_exported():
    class Ranks(torch.nn.Module):
        def forward(self, x):
            return pp.matrix_rank(x, rtol=1e-3)

    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(Ranks(), (torch.randn(3, 4, 4),), dynamic_shapes=({0: batch},))
    assert "pyprune.matrix_rank" in str(program.graph)
    maps = torch.randn(7, 4, 4)
    assert torch.equal(program.module()(maps), pp.matrix_rank(maps, rtol=1e-3))


@pytest.mark.parametrize("in_dim", [0, 1, -1])
def test_vmap_ranks_the_whole_batch_at_once(in_dim, monkeypatch):
    maps = torch.randn(3, 5, 4, 6).relu()
    calls = []
    run = pp.ops.rank._run
    monkeypatch.setattr(pp.ops.rank, "_run", lambda *args, **kwargs: calls.append(1) or run(*args, **kwargs))
    ranks = torch.vmap(pp.matrix_rank, in_dims=in_dim)(maps.movedim(0, in_dim))
    assert (len(calls), ranks.dtype) == (1, torch.int32)
    assert torch.equal(ranks, pp.matrix_rank(maps))
    assert torch.equal(torch.vmap(torch.vmap(pp.matrix_rank))(maps), pp.matrix_rank(maps))


def test_ranks_carry_no_gradient():
    maps = torch.randn(2, 4, 4, requires_grad=True)
    ranks = pp.matrix_rank(maps)
    assert not ranks.requires_grad
    (maps.sum() * ranks.sum()).backward()
    assert (maps.grad == ranks.sum()).all()


def test_autocast_and_inference_mode_change_nothing():
    maps = torch.eye(9).repeat(6, 1, 1)
    maps[:, :2] = 1
    maps[:, 1, 0] += 2**-12  # bfloat16 would see two equal rows
    want = _reference.matrix_rank(maps.numpy()).tolist()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pp.matrix_rank(maps).tolist() == want
    assert pp.matrix_rank(maps.bfloat16()).tolist() != want
    with torch.inference_mode():
        assert pp.matrix_rank(maps.clone()).tolist() == want


def test_shapes_without_values():
    ranks = pp.matrix_rank(torch.randn(3, 2, 4, 5, device="meta"))
    assert (ranks.shape, ranks.dtype, ranks.device.type) == ((3, 2), torch.int32, "meta")


def test_tensor_subclasses_and_views():
    parameter = torch.nn.Parameter(torch.eye(4))
    assert pp.matrix_rank(parameter) == 4
    assert pp.matrix_rank(torch.complex(torch.eye(3), torch.ones(3, 3)).conj().imag) == 1  # its negative bit is set


def test_a_second_copy_of_the_module_finds_the_operators():
    done = _python("""
        import sys, torch, pyprune as pp, gc
        first = pp.matrix_rank(torch.eye(3))
        for name in [name for name in sys.modules if name.startswith("pyprune")]:
            del sys.modules[name]
        del pp
        gc.collect()
        import pyprune as pp
        print(int(first), int(pp.matrix_rank(torch.eye(4))))
        import importlib
        from pyprune.ops import _library
        importlib.reload(_library)
        print(int(pp.matrix_rank(torch.eye(5))))
    """)
    assert done.stdout.split() == ["3", "4", "5"], done.stderr


def test_arrays_of_numpy_do_not_load_torch():
    done = _python("""
        import sys, numpy as np, pyprune as pp
        print(pp.matrix_rank(np.eye(3)), "torch" in sys.modules)
    """)
    assert done.stdout.split() == ["3", "False"], done.stderr


def _python(source):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)], capture_output=True, text=True, check=False, timeout=300
    )
