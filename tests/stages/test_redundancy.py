"""CKRM: lambda per layer against hand-worked cases, properties of the measure, sampling, files, figures, bad input."""

import json
import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import nn

import pyprune as pp
from pyprune import files
from pyprune.convolutions import Kernels, read_networks
from pyprune.redundancy import _pair, wilson
from pyprune.redundancy_plots import depth_figure, omega_figure, plot_ckrm, redundancy_page
from pyprune.types import EPSILONS, LayerRedundancy
from tolerances import HAND_ROUNDED, NULL_MEAN, SCORE_INTERVAL

V1 = Path(__file__).parent.parent / "frozen" / "v1"

# Three 2x2 kernels with one input channel. With m, s the mean and deviation of a slice:
#   x = [[1, 1], [-1, -1]]  m = 0, s = 1      y = [[1, -1], [1, -1]]  m = 0, s = 1      z = 2 x + 1  m = 1, s = 2
# and covariances s_xy = 0, s_xz = 2, s_yz = 0. With the plain constant 1:
#   x, y: L = 1/1, C = 3/3, S = 1/2            Psi = 0.5
#   x, z: L = 1/2, C = 5/6, S = 3/3            Psi = 0.5^0.1 * 5/6       = 0.77753
#   y, z: L = 1/2, C = 5/6, S = 1/3            Psi = 0.5^0.1 * 5/6 * 1/3 = 0.25918
# The mean square weight is (1 + 1 + 5) / 3 = 7/3.
BY_HAND = np.array([[[[1.0, 1], [-1, -1]]], [[[1, -1], [1, -1]]], [[[3, 3], [-1, -1]]]])


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def only(weights: object, **options: object) -> LayerRedundancy:
    options.setdefault("null", False)
    return pp.ckrm(weights, **options)["weights"]


class SmallNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12)
        self.up = nn.ConvTranspose2d(12, 6, 2)
        self.single = nn.Conv2d(6, 1, 3)
        self.audio = nn.Conv1d(4, 4, 3)
        self.volume = nn.ConvTranspose3d(4, 4, 3)
        self.head = nn.Linear(4, 2)


class Foreign:
    """An array that is known by DLPack alone."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __dlpack__(self, **how: object) -> object:
        return self.array.__dlpack__(**how)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return SmallNet()


@pytest.mark.parametrize("constant", [{"eps_absolute": 1.0}, {"eps": 3 / 7}])
def test_three_kernels_by_hand(constant: dict[str, float]) -> None:
    layer = only(BY_HAND, thresholds=(0.6, 0.4, 0.8), **constant)
    assert layer.pairs == layer.all_pairs == 3
    assert [(i, j) for i, j, _ in layer.top] == [(0, 2), (0, 1), (1, 2)]
    assert [psi for _, _, psi in layer.top] == pytest.approx([0.77753, 0.5, 0.25918], abs=HAND_ROUNDED)
    assert layer.mean == pytest.approx((0.77753 + 0.5 + 0.25918) / 3, abs=HAND_ROUNDED)
    assert layer.lambdas[0].tolist() == [1 / 3, 2 / 3, 0]
    assert np.flatnonzero(layer.histogram).tolist() in ([25, 49, 77], [25, 50, 77])  # 0.5 lies on an edge
    assert layer.twins.tolist() == [2, 0, 0]
    assert layer.twin_psi == pytest.approx([0.77753, 0.5, 0.77753], abs=HAND_ROUNDED)
    assert layer.mean_square == pytest.approx(7 / 3)
    assert layer.eps == pytest.approx(3 / 7)


def test_another_weight_gives_another_answer() -> None:
    disturbed = BY_HAND.copy()
    disturbed[0, 0, 0, 0] += 0.1
    assert only(disturbed, eps_absolute=1.0).top[0][2] != pytest.approx(0.77753, abs=HAND_ROUNDED)


def test_duplicated_filters_are_what_lambda_counts() -> None:
    kernels = normal(3, 4, 3, 3)
    layer = only(np.concatenate([kernels, -kernels]), thresholds=(0.99,))
    assert (layer.lambdas == 3 / 15).all()  # at every constant: a filter and its negative are alike
    assert {(i, j) for i, j, psi in layer.top if psi > 0.999_999} == {(0, 3), (1, 4), (2, 5)}
    assert layer.twins.tolist() == [3, 4, 5, 0, 1, 2]


def test_the_constant_asked_is_row_0_and_the_others_follow() -> None:
    weights = normal(12, 2, 3, 3)
    result = pp.ckrm(weights, eps=0.5, null=False, thresholds=(0.3, 0.6))
    for row, eps in enumerate((0.5, *EPSILONS)):
        assert (
            result["weights"].counts[row].tolist() == only(weights, eps=eps, thresholds=(0.3, 0.6)).counts[0].tolist()
        )
        assert result.lambdas(0.6, eps=eps)["weights"] == result["weights"].lambdas[row, 1]
    assert len(set(result["weights"].counts[:, 0].tolist())) > 1
    with pytest.raises(ValueError, match=r"measured at eps .* and as asked; got 0.2"):
        result.lambdas(eps=0.2)
    with pytest.raises(ValueError, match=r"measured at thresholds \[0.3, 0.6\]; got 0.7"):
        result.lambdas(0.7)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1), st.integers(-40, 40))
def test_order_and_scale_do_not_matter(seed: int, exponent: int) -> None:
    weights = normal(7, 3, 2, 3, seed=seed)
    order = np.random.default_rng(seed).permutation(7)
    layer, moved = only(weights), only(weights[order] * 2.0**exponent)
    assert moved.histogram.tolist() == layer.histogram.tolist()
    assert moved.counts.tolist() == layer.counts.tolist()
    assert [psi for *_, psi in moved.top] == pytest.approx([psi for *_, psi in layer.top])
    if exponent:
        assert only(weights * 2.0**exponent, eps_absolute=1.0).top != only(weights, eps_absolute=1.0).top


def test_any_floating_type_and_library_goes_in() -> None:
    weights = normal(5, 2, 3, 3).astype(np.float32)
    expected = only(weights).counts.tolist()
    for given_ in (torch.from_numpy(weights), weights.astype(np.float64), np.asfortranarray(weights), Foreign(weights)):
        assert only(given_).counts.tolist() == expected
    assert only(torch.from_numpy(weights).to(torch.bfloat16)).pairs == 10


def test_all_zero_weights_are_all_alike() -> None:
    layer = only(np.zeros((4, 2, 3, 3)))
    assert (layer.lambdas == 1).all()
    assert layer.note == "all weights are zero, so all pairs are alike"


@pytest.mark.parametrize(("filters", "groups"), [(2, 1), (5, 1), (3, 4), (2, 3)])
def test_numbered_pairs_are_all_pairs_within_groups(filters: int, groups: int) -> None:
    count = groups * filters * (filters - 1) // 2
    expected = [(g * filters + i, g * filters + j) for g in range(groups) for i, j in combinations(range(filters), 2)]
    assert [tuple(pair) for pair in _pair(np.arange(count), filters).tolist()] == expected


def test_grouped_filters_pair_within_their_group(net: nn.Module) -> None:
    layer = pp.ckrm(net, eps_absolute=1e-3, null=False)["grouped"]
    halves = [only(half, eps_absolute=1e-3) for half in net.grouped.weight.detach().split(6)]
    assert layer.pairs == 30
    assert layer.histogram.tolist() == (halves[0].histogram + halves[1].histogram).tolist()
    assert all((i < 6) == (j < 6) for i, j, _ in layer.top)
    assert layer.twins.tolist() == [*halves[0].twins.tolist(), *(halves[1].twins + 6).tolist()]
    assert layer.note == "pairs within each of 2 groups"


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_have_their_filters_first(groups: int) -> None:
    module = nn.ConvTranspose2d(4, 6, 3, groups=groups)
    kernels = read_networks("t", module)["network"].layers["weights"].on_host()
    inputs, outputs = 4 // groups, 6 // groups
    for f in range(6):
        for c in range(inputs):
            expected = module.weight[f // outputs * inputs + c, f % outputs].detach().double().numpy()
            assert np.array_equal(kernels[f, c], expected)


def test_what_is_left_out_and_what_has_no_pairs_is_said(net: nn.Module) -> None:
    result = pp.ckrm(net)
    assert list(result.layers()) == ["first", "grouped", "depthwise", "up", "single"]
    assert result.left_out["network"] == {
        "pointwise": "1x1 kernels have no structure",
        "audio": "is a 1-d convolution; kernels must be K1 x K2",
        "volume": "is a 3-d convolution; kernels must be K1 x K2",
    }
    assert result["depthwise"].note == "no pairs: each group has one filter"
    assert result["single"].note == "no pairs: it has one filter"
    assert np.isnan(result.lambdas()["single"])
    text = str(result)
    assert re.search(r"single +1x6x3x3 +0 +-", text)
    assert "left out, 1x1 kernels have no structure: pointwise" in text
    assert "pointwise" in pp.ckrm(net, include_1x1=True).layers()


def test_files_folders_and_state_dicts(net: nn.Module, tmp_path: Path) -> None:
    files.write_tensors(tmp_path / "w", {f"module.{k}": v for k, v in net.state_dict().items()}, {})
    from_file, from_dict = pp.ckrm(tmp_path / "w", null=False), pp.ckrm(dict(net.state_dict()), null=False)
    assert from_file.lambdas()["first"] == from_dict.lambdas()["first"]
    assert from_file["first"].histogram.tolist() == pp.ckrm(net, null=False)["first"].histogram.tolist()
    assert from_file.notes == ("Read from weights alone: groups and transposed convolutions cannot be seen.",)
    assert from_file.left_out["network"]["audio"] == "has shape [4, 4, 3]; kernels must be [F2, F1, K1, K2]"
    slim = pp.ckrm(V1 / "slim")
    assert slim["0"].all_pairs == 3
    assert slim.notes == ()


def test_layers_of_a_file_stand_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = [f"features.{i}.weight" for i in (0, 2, 9, 10, 100)]
    files.write_tensors(tmp_path / "w", {name: torch.randn(2, 1, 2, 2) for name in reversed(names)}, {})
    assert [f"{name}.weight" for name in pp.ckrm(tmp_path / "w", null=False).layers()] == names


def test_several_networks_in_one_result() -> None:
    a, b = normal(6, 2, 3, 3), normal(6, 2, 3, 3, seed=1)
    result = pp.ckrm([{"c": a}, {"c": b}], null=False)
    assert list(result.networks) == ["run 0", "run 1"]
    assert result["run 1", "c"].histogram.tolist() == only(b).histogram.tolist()
    assert result["run 0", "c"].histogram.tolist() != only(b).histogram.tolist()
    assert result.lambdas(network="run 0") == {"c": only(a).lambdas[0, 0]}
    assert str(result).index("run 0\n") < str(result).index("run 1\n")
    with pytest.raises(KeyError, match="there are 2 networks; name one of"):
        result["c"]
    with pytest.raises(KeyError, match="no network 'run 00'; did you mean 'run 0'"):
        result["run 00", "c"]
    with pytest.raises(KeyError, match="no layer 'conv1'"):
        result["run 0", "conv1"]
    named = pp.ckrm({"before": a, "after": {"c": b}}, null=False)  # mixed kinds are networks
    assert list(named.networks) == ["before", "after"]


def test_sampling_all_pairs_is_exact() -> None:
    weights = normal(9, 2, 3, 3)
    exact, sampled = only(weights), only(weights, pairs=36)
    assert sampled.counts.tolist() == exact.counts.tolist()
    assert sampled.histogram.tolist() == exact.histogram.tolist()
    assert not sampled.sampled
    assert sampled.intervals[0, 0].tolist() == [exact.lambdas[0, 0]] * 2


def test_samples_are_seeded_distinct_and_differ_by_layer() -> None:
    weights = normal(20, 1, 3, 3)
    drawn = [only(weights, pairs=50, seed=seed, top=50).top for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({(i, j) for i, j, _ in drawn[0]}) == 50
    both = pp.ckrm({"a": weights, "b": weights}, pairs=50, top=50, null=False)
    assert both["a"].top != both["b"].top
    assert both["a"].top == pp.ckrm({"a": weights}, pairs=50, top=50, null=False)["a"].top
    part = pp.ckrm({"a": weights, "b": weights}, pairs={"b": 50}, null=False)
    assert (part["a"].pairs, part["b"].pairs) == (190, 50)
    assert "50 of 190" in str(part)


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (0, 50), (3, 7), (50, 50), (499, 100_000)])
def test_the_interval_is_wilsons(successes: int, trials: int) -> None:
    expected = binomtest(successes, trials).proportion_ci(method="wilson")
    assert wilson(successes, trials).tolist() == pytest.approx([expected.low, expected.high], abs=SCORE_INTERVAL)
    assert wilson(successes, trials, 0.9).tolist() != pytest.approx([expected.low, expected.high], abs=SCORE_INTERVAL)


def test_the_interval_covers_the_exact_lambda() -> None:
    weights = normal(40, 1, 3, 3)
    exact = only(weights, thresholds=0.4).lambdas[0, 0]
    assert 0.1 < exact < 0.4
    runs = [only(weights, thresholds=0.4, pairs=100, seed=seed) for seed in range(60)]
    ends = np.array([run.intervals[0, 0] for run in runs])
    covered = (ends[:, 0] <= exact) & (exact <= ends[:, 1])
    assert covered.sum() >= 54  # 57 expected
    middle = ends.mean(axis=1)
    narrow = np.abs(middle - exact) <= (ends[:, 1] - middle) / 4
    assert narrow.sum() < 40  # an interval of a quarter of the width would not do


def test_the_null_of_3x3_kernels() -> None:
    one = only(normal(4, 1, 3, 3), null=True, eps=1e-12).random
    many = only(normal(4, 64, 3, 3), null=True, eps=1e-12).random
    assert one is not None
    assert many is not None
    assert one.mean == pytest.approx(0.2561, abs=5 * NULL_MEAN)  # of four million pairs, by numpy: 0.25615
    assert many.mean == pytest.approx(0.2561, abs=NULL_MEAN)
    assert many.std == pytest.approx(one.std / 8, rel=0.1)  # the mean of 64 channels
    assert one.lambdas[0, 0] > 0.03 > 0 == many.lambdas[0, 0]  # one threshold means different things
    default = only(normal(4, 64, 3, 3), null=True).random
    assert default is not None
    assert default.mean == pytest.approx(0.2684, abs=NULL_MEAN)
    assert default.mean != pytest.approx(0.2561, abs=NULL_MEAN)


def test_random_kernels_lie_in_their_null_and_others_beyond() -> None:
    random = only(normal(60, 8, 3, 3, seed=5), null=True)
    assert abs(random.z) < 0.2
    assert 0 < random.above_random_share < 0.03
    mixed = normal(60, 8, 3, 3, seed=5) + 2 * normal(1, 8, 3, 3, seed=6)
    alike = only(mixed, null=True)
    assert alike.z > 2
    assert alike.above_random_share > 0.5
    assert alike.random.histogram.tolist() == random.random.histogram.tolist()


def test_faint_filters_are_counted_and_count_as_alike() -> None:
    weights = normal(10, 8, 3, 3)
    weights[3:6] *= 1e-2
    layer = only(weights)
    assert layer.faint == 3
    assert layer.counts[:, 0].tolist() == [3, 0, 3, 3]
    assert only(weights, eps=1e-6).faint == 0


def test_results_come_back_bit_for_bit(net: nn.Module, tmp_path: Path) -> None:
    result = pp.ckrm({"a": net, "b": net}, thresholds=(0.3, 0.6), pairs={"first": 9})
    result.save(tmp_path / "r")
    back = pp.CKRM.load(tmp_path / "r")
    assert back == result
    assert back != pp.ckrm(net)
    assert list(back.networks["a"]) == list(result.networks["a"])
    assert back["a", "first"].random.lambdas.tolist() == result["a", "first"].random.lambdas.tolist()
    assert np.isnan(back["a", "single"].mean)
    assert str(back) == str(result)
    assert json.loads(json.dumps(result.to_json(), allow_nan=False)) == result.to_json()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: layer.update(pairs=27), "histogram that does not hold its 27 pairs"),
        (lambda layer: layer.update(pairs=29), "counts that 29 of 28 pairs cannot give"),
        (lambda layer: layer["counts"].pop(), "counts of shape"),
        (lambda layer: layer["counts"].__setitem__(1, [99]), "pairs cannot give"),
        (lambda layer: layer["twins"].__setitem__(0, 8), "twins beyond its 8 filters"),
        (lambda layer: layer["twins"].pop(), "twins for other than its 8 filters"),
        (lambda layer: layer["top"].append([0, 8, 0.5]), "similar pairs beyond its 8 filters"),
        (lambda layer: layer["random"]["lambdas"].pop(), "a null of another shape"),
        (lambda layer: layer.pop("mean"), "lacks or garbles 'mean'"),
        (lambda layer: layer.update(counts="many"), "CKRM.load: "),
        (lambda layer: layer.update(shape=[1]), "CKRM.load: "),
    ],
)
def test_damaged_results_are_refused(tmp_path: Path, change: object, message: str) -> None:
    content = pp.ckrm({"c": normal(8, 2, 3, 3)}).to_json()
    change(content["networks"]["network"]["c"])  # type: ignore[operator]
    files.write_json(tmp_path / "r", content)
    with pytest.raises(ValueError, match=message):
        pp.CKRM.load(tmp_path / "r")


def test_nulls_and_results_cannot_be_changed() -> None:
    weights = normal(5, 2, 3, 3)
    layer = only(weights, null=True)
    assert layer.random is not None
    for array in (layer.counts, layer.histogram, layer.twins, layer.random.histogram):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 7
    again = only(weights, null=True).random
    assert again is layer.random  # one null for all layers of a shape


def test_every_layer_moves_the_bar(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, seen = [], []

    @contextmanager
    def bar(description: str, total: float, show: bool) -> Iterator[Callable[..., None]]:
        asked.append((description, total, show))
        yield lambda n=1, note="": seen.append(note)

    monkeypatch.setattr("pyprune.progress.bar", bar)
    pp.ckrm([net, net], null=False, layers=(name for name in ("first", "up")))
    pp.ckrm(net, null=False, layers="up", progress=False)
    assert asked == [("ckrm", 4, True), ("ckrm", 1, False)]
    assert seen == ["first", "up", "first", "up", "up"]


def test_wrapped_modules_have_their_own_names(net: nn.Module) -> None:
    assert list(pp.ckrm(nn.DataParallel(net), null=False).layers()) == list(pp.ckrm(net, null=False).layers())


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    weights = normal(40, 16, 3, 3)
    layer, there = only(weights), only(torch.from_numpy(weights).cuda())
    assert there.counts.tolist() == layer.counts.tolist()
    assert there.histogram.tolist() == layer.histogram.tolist()
    assert there.variant != layer.variant
    assert only(torch.from_numpy(weights).cuda(), pairs=100).pairs == 100


def test_no_bar_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    pp.ckrm(normal(3, 1, 3, 3))
    assert capsys.readouterr() == ("", "")


def png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n")


def addresses(root: ET.Element) -> list[str]:
    """Return what the elements of an SVG refer to, other than parts of itself and pictures inside it."""
    values = [value for one in root.iter() for name, value in one.attrib.items() if name.endswith("href")]
    return [value for value in values if not value.startswith(("#", "data:"))]


def test_figures_are_whole_and_ask_for_nothing(net: nn.Module, tmp_path: Path) -> None:
    runs = {"seed 1": net, "seed 2": SmallNet()}
    result = pp.ckrm(runs)
    paths = plot_ckrm(result, tmp_path / "svg", runs)
    assert [path.name for path in paths.values()] == ["omega.svg", "depth.svg", "kernels_0.svg", "kernels_1.svg"]
    for path in paths.values():
        root = ET.parse(path).getroot()  # noqa: S314
        assert root.tag.endswith("svg")
        assert addresses(root) == []
    assert addresses(ET.fromstring('<svg><image href="http://there"/></svg>')) == ["http://there"]  # noqa: S314
    again = plot_ckrm(result, tmp_path / "again")
    assert list(again) == ["omega", "depth"]  # no kernels without weights
    assert again["depth"].read_bytes() == paths["depth"].read_bytes()
    assert all(png(path) for path in plot_ckrm(result, tmp_path / "png", runs, form="png").values())


def test_hostile_names_do_no_harm(tmp_path: Path) -> None:
    weights = {
        "$\\frac{1}$\x1b[31m<script>alert(1)</script>": normal(3, 1, 3, 3),
        "_": normal(3, 3, 3, 3),
        "é": BY_HAND,
    }
    runs = {"_<b>&\x00": weights, "../../x" * 20: weights}
    result = pp.ckrm(runs)
    assert "\x1b" not in str(result)
    for path in plot_ckrm(result, tmp_path / "f", runs).values():
        ET.parse(path)  # noqa: S314
        assert path.parent == tmp_path / "f"
    redundancy_page(result, tmp_path / "page.html", runs)
    page = (tmp_path / "page.html").read_text()
    assert "&lt;script&gt;" in page
    assert "<script" not in page


def test_the_page_is_self_contained(net: nn.Module, tmp_path: Path) -> None:
    result = pp.ckrm(net, pairs={"first": 20})
    pp.report(result, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert page.count("<img") == 2
    assert "pointwise is left out: 1x1 kernels have no structure." in page
    assert "20 of 28" in page
    redundancy_page(result, tmp_path / "more.html", net)
    assert (tmp_path / "more.html").read_text().count("<img") == 3


def test_a_figure_shows_a_bounded_number_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyprune.redundancy_plots.SHOWN_LAYERS", 4)
    result = pp.ckrm({f"c{i}": BY_HAND for i in range(5)}, null=False)
    assert sum(bool(axes.get_title()) for axes in omega_figure(result).axes) == 4
    assert len(depth_figure(result).axes[0].lines[0].get_xdata()) == 4


def test_figures_want_the_weights_that_were_measured(net: nn.Module, tmp_path: Path) -> None:
    result = pp.ckrm(net)
    with pytest.raises(ValueError, match=r"those that were measured; they have no 'first' of shape \[8, 3, 3, 3\]"):
        plot_ckrm(result, tmp_path, {"first": normal(8, 4, 3, 3)})
    with pytest.raises(ValueError, match="form must be 'svg' or 'png'; got 'gif'"):
        plot_ckrm(result, tmp_path, form="gif")
    with pytest.raises(TypeError, match=r"needs the CKRM of pyprune.ckrm; got dict"):
        plot_ckrm({}, tmp_path)
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match="output folder must be writable"):
        plot_ckrm(result, tmp_path / "taken")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thresholds": (0.5, 1.1)}, r"different numbers in \[0, 1\], at least one; got \[0.5, 1.1\]"),
        ({"thresholds": -0.1}, r"got \[-0.1\]"),
        ({"thresholds": ()}, r"got \[\]"),
        ({"thresholds": (0.5, 0.5)}, "different numbers"),
        ({"thresholds": float("nan")}, r"got \[nan\]"),
        ({"eps": 0}, "eps must be a positive, finite number; got 0"),
        ({"eps": float("inf")}, "eps must be a positive"),
        ({"eps_absolute": -1.0}, "eps_absolute must be a positive"),
        ({"alpha": 0}, "alpha must be a positive"),
        ({"pairs": 0}, "pairs must be a whole number of at least 1; got 0"),
        ({"pairs": 2.5}, "pairs must be a whole number"),
        ({"pairs": True}, "pairs must be a whole number"),
        ({"pairs": 29}, "pairs=29 is more than the 28 pairs of 'conv1'. Ask for fewer, or pass"),
        ({"pairs": {"conv1": 29}}, "pairs=29 is more than the 28 pairs"),
        ({"pairs": {"conv": 3}}, "no layer 'conv' to measure. Did you mean 'conv1'?"),
        ({"layers": ["cnov1"]}, "no layer 'cnov1' to measure. Did you mean 'conv1'?"),
        ({"layers": ["zzz"]}, "no layer 'zzz' to measure. There are conv1"),
        ({"layers": []}, "layers must name at least one layer; got none"),
        ({"layers": "point"}, "layer 'point' cannot be measured: it 1x1 kernels"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"top": -1}, "top must be a whole number of at least 0"),
        ({"variant": "fast"}, "variant 'fast' is unknown"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message) if "\\" not in message else message):
        pp.ckrm({"conv1": normal(8, 2, 3, 3), "point": normal(8, 2, 1, 1)}, null=False, **options)


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        (normal(64, 27), r"weights must be \[F2, F1, K1, K2\]; got \[64, 27\]. Pass them before flattening"),
        (normal(0, 3, 3, 3), r"got \[0, 3, 3, 3\]"),
        (normal(1, 3, 3, 3), "a layer with two filters that read the same channels; 'weights' has 1 filter"),
        (nn.Conv2d(4, 4, 3, groups=4), "'weights' has 4 filters in 4 groups"),
        (nn.Linear(3, 3), "a 2-d convolution with kernels larger than 1x1; there is no convolution"),
        (nn.Conv2d(3, 4, 1), "'weights' 1x1 kernels have no structure. Pass include_1x1=True"),
        (nn.Sequential(nn.Conv1d(3, 4, 3), nn.Conv1d(3, 4, 3)), r"'0' is a 1-d convolution; .* \(and 1 more\)"),
        (nn.LazyConv2d(4, 3), "has no numbers yet"),
        (nn.Conv2d(3, 4, 3, device="meta"), "has no numbers yet"),
        ([], "at least one network; got an empty list"),
        ({}, "there is no convolution"),
        (np.full((2, 1, 3, 3), np.nan), "the weights of 'weights' must be finite"),
        (np.full((2, 1, 3, 3), 1e200), "and so must their squares"),
        ("nowhere.safetensors", "nowhere.safetensors"),
        ([normal(3, 1, 3, 3), nn.Linear(3, 3)], "ckrm: run 1: needs a 2-d convolution"),
    ],
)
def test_bad_networks(given_: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pp.ckrm(given_, null=False)


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        (3, "needs a torch.nn.Module, weights, or the path of a safetensors file or slim folder; got int"),
        ({"epoch": 3}, "ckrm: needs a torch.nn.Module"),
        ([[1.0]], "got list"),
        (np.ones((2, 1, 3, 3), np.int64), "weights must be of a floating type; got int64"),
    ],
)
def test_things_that_are_no_networks(given_: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        pp.ckrm(given_)


def test_a_slim_folder_whose_files_do_not_belong_together(tmp_path: Path) -> None:
    (tmp_path / "architecture.json").write_bytes((V1 / "slim" / "architecture.json").read_bytes())
    files.write_tensors(tmp_path / "model.safetensors", {"0.weight": torch.zeros(3, 2, 3, 3)}, {})
    with pytest.raises(ValueError, match="the files do not belong together"):
        pp.ckrm(tmp_path)


def test_nothing_is_ever_unpickled(tmp_path: Path) -> None:
    torch.save({"c": torch.zeros(2, 1, 3, 3)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        pp.ckrm(tmp_path / "w.pth")


def test_the_variant_is_handed_on_and_named() -> None:
    assert only(normal(3, 1, 3, 3), variant="reference").variant == "reference"
    assert Kernels(normal(3, 1, 3, 3)).shape == (3, 1, 3, 3)


@pytest.mark.slow
@pytest.mark.skipif("PYPRUNE_DATA" not in os.environ, reason="needs a pretrained ResNet-56 under PYPRUNE_DATA")
def test_what_the_documentation_says_of_a_real_network() -> None:
    result = pp.ckrm(Path(os.environ["PYPRUNE_DATA"]) / "cifar10_resnet56-4bfd9763.safetensors")
    layers = result.layers().values()
    assert (len(layers), sum(layer.pairs for layer in layers)) == (55, 47_496)
    for eps, redundant, pairs in ((1e-12, 2, 4), (1e-2, 20, 65), (1e-1, 36, 1747)):
        assert sum(value > 0 for value in result.lambdas(eps=eps).values()) == redundant
        assert sum(layer.counts[result.row(eps), 0] for layer in layers) == pairs
    assert sum(layer.faint for layer in layers) == 60
    assert sum(layer.faint * (layer.faint - 1) // 2 for layer in layers) == 53
    assert all(layer.above_random_share > 0.05 for layer in layers)
