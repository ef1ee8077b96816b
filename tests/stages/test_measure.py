import platform
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from pyprune import graph, measure, models
from pyprune.compaction import compact
from pyprune.types import Plan, Profile
from tolerances import LOSS_FLOAT64, MEAN_OF_RATIOS

PUBLISHED = (7, 12, 26, 21, 44, 38, 34, 60, 111, 117, 100, 79, 512)
"""Filters kept in each convolution of VGG-16 in the thesis's Table 5.2, with the last convolution left whole."""

POSITIONS = (0, 1, 3, 4, 6, 7, 8, 10, 11, 12, 14, 15, 16)


def batches(scores, labels, size=2):
    return DataLoader(TensorDataset(scores, labels), batch_size=size)


def published_plan(last=512):
    kept = (*PUBLISHED[:-1], last)
    return Plan({f"features.conv{i}": range(count) for i, count in zip(POSITIONS, kept, strict=True)})


# evaluate: nn.Identity is a model whose images are the scores


def test_evaluate_counts_by_hand():
    scores = torch.tensor([[3.0, 1, 0], [0, 2, 1], [2, 1, 0], [0, 0, 5], [1, 0, 0]])
    labels = torch.tensor([0, 1, 1, 2, 2])
    found = measure.evaluate(nn.Identity(), batches(scores, labels), num_classes=3)
    assert found.confusion.tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    assert (found.images, found.top1, found.top5) == (5, 0.6, None)
    assert found.per_class.tolist() == [1.0, 0.5, 0.5]
    assert found.loss == pytest.approx(float(F.cross_entropy(scores.double(), labels)), abs=LOSS_FLOAT64)
    labels[0] = 2
    assert measure.evaluate(nn.Identity(), batches(scores, labels)).confusion.tolist() != found.confusion.tolist()


def test_evaluate_counts_top5_from_six_classes_on():
    scores = torch.arange(7.0).repeat(3, 1)  # classes 2 to 6 are the best five
    found = measure.evaluate(nn.Identity(), batches(scores, torch.tensor([6, 2, 1])))
    assert (found.top1, found.top5) == (1 / 3, 2 / 3)


def test_auc_is_the_mean_of_one_against_the_rest():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 4
    scores = torch.randn(60, 4, generator=generator) + 2 * F.one_hot(labels, 4)
    expected = roc_auc_score(labels, scores.double().softmax(1), multi_class="ovr", average="macro")
    found = measure.evaluate(nn.Identity(), batches(scores, labels, 7))
    assert found.auc == pytest.approx(expected, abs=MEAN_OF_RATIOS)
    assert 0.6 < found.auc < 1
    sure = measure.evaluate(nn.Identity(), batches(40 * scores, labels, 7))  # probabilities that round to 1 tie
    assert sure.auc < 1
    assert measure.evaluate(nn.Identity(), batches(scores[labels < 3], labels[labels < 3])).auc is None


def test_evaluate_puts_training_flags_back_and_needs_no_gradient():
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(6), nn.Linear(6, 6))
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = batches(torch.randn(8, 6), torch.arange(8) % 6)
    first, second = (measure.evaluate(model, data).loss for _ in range(2))
    assert first == second  # dropout was off
    assert [module.training for module in model] == [True, False, True]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="label"):
        measure.evaluate(model, batches(torch.randn(2, 6), torch.tensor([0, 6])))
    assert [module.training for module in model] == [True, False, True]


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ([], ValueError, "evaluate: needs at least one image; the loader is empty"),
        ([(torch.zeros(2, 3), [0, 3])], ValueError, r"labels must be in \[0, 3\), the model's outputs; got 3"),
        ([(torch.zeros(2, 3), [-1, 0])], ValueError, r"labels must be in \[0, 3\), the model's outputs; got -1"),
        ([(torch.zeros(2, 3), [0.0, 1.0])], TypeError, r"labels must be integers \[N\]; got torch.float32"),
        ([(torch.zeros(2, 3), [0])], ValueError, r"one label per image; batch 0 has images \[2, 3\] and labels \[1\]"),
        ([torch.zeros(2, 3)], TypeError, r"must yield \(images, labels\).*batch 0 is a Tensor"),
        ([{"x": 1}], TypeError, "batch 0 is a dict"),
        ([(torch.zeros(2, 3, 1), [0, 1])], TypeError, r"must return class scores \[2, C\]; got \[2, 3, 1\]"),
        (
            [(torch.zeros(2, 3), [0, 1]), (torch.tensor([[0.0, 0, float("nan")], [0, 0, 0]]), [0, 1])],
            ValueError,
            "outputs must be finite; 1 of 2 images of batch 1 gave NaN",
        ),
    ],
)
def test_evaluate_refuses_what_it_cannot_score(loader, error, message):
    with pytest.raises(error, match=message):
        measure.evaluate(nn.Identity(), loader)


def test_evaluate_guards_the_number_of_classes():
    with pytest.raises(ValueError, match="evaluate: the model must have num_classes=4 outputs; it has 3"):
        measure.evaluate(nn.Identity(), batches(torch.zeros(2, 3), torch.tensor([0, 1])), num_classes=4)


# profile


@pytest.mark.parametrize("last", [512, 79])
def test_published_table_by_hrank_v1_does_not_depend_on_what_follows(last):
    found = measure.profile(models.vgg16_bn(), torch.zeros(1, 3, 32, 32), plan=published_plan(last), latency=False)
    if last == 512:
        assert (found.hrank_v1_parameters, found.hrank_v1_macs) == (4_904_784, 63_185_418)
    gone = 512 - last  # filters of the last convolution at full input width, on a 2x2 map
    assert found.hrank_v1_parameters == 4_904_784 - gone * (512 * 9 + 1)
    assert found.hrank_v1_macs == 63_185_418 - gone * 512 * 9 * 4


@pytest.mark.parametrize(("last", "parameters", "macs"), [(512, 1_051_567, 10_735_920), (79, 520_709, 9_282_772)])
def test_published_table_really_compacted(last, parameters, macs):
    found = measure.profile(models.vgg16_bn(), torch.zeros(1, 3, 32, 32), plan=published_plan(last), latency=False)
    assert (found.parameters, found.macs) == (parameters, macs)
    assert [layer.kept for layer in found.layers] == [*PUBLISHED[:-1], last, 512, 10]
    assert [layer.outputs for layer in found.layers][:2] == [64, 64]


def narrow_digits(widths):
    return models.vgg_digits(widths=widths)


def test_profile_with_a_plan_is_the_profile_of_the_narrow_network():
    """Its last maps are 2x2, so the linear layer loses four inputs for each filter."""
    wide, narrow = narrow_digits((8, 8, 12, 12)), narrow_digits((5, 8, 7, 3))
    plan = Plan({"features.conv0": [0, 1, 4, 5, 7], "features.conv3": range(7), "features.conv4": [2, 3, 9]})
    image = torch.zeros(1, 1, 16, 16)
    planned, real = measure.profile(wide, image, plan=plan), measure.profile(narrow, image)
    assert (planned.parameters, planned.macs) == (real.parameters, real.macs)
    for one, other in zip(planned.layers, real.layers, strict=True):
        assert (one.kept, one.parameters, one.macs) == (other.kept, other.parameters, other.macs)
    assert planned.hrank_v1_macs != real.hrank_v1_macs


@pytest.mark.parametrize("seed", range(3))
def test_what_a_plan_promises_is_what_compaction_delivers(seed):
    """Random plans on VGG-16: the prediction equals a recount of the slim network, layer by layer."""
    rng = np.random.default_rng(seed)
    model, image = models.vgg16_bn(width=0.125), torch.zeros(1, 3, 32, 32)
    keep = {}
    for name, layer in graph.convolutions(model).items():
        count = int(rng.integers(1, layer.out_channels + 1))
        keep[name] = rng.choice(layer.out_channels, count, replace=False)
    promised = measure.profile(model, image, plan=Plan(keep), latency=False)
    slim = compact(model, Plan(keep), image, verify=False, latency=False).model
    counted = measure.profile(slim, image, latency=False)
    assert (promised.parameters, promised.macs) == (counted.parameters, counted.macs)
    assert counted.parameters == sum(p.numel() for p in slim.parameters())
    assert [(one.kept, one.macs) for one in promised.layers] == [(one.kept, one.macs) for one in counted.layers]
    assert promised.macs < measure.profile(model, image, latency=False).macs


class Mixed(nn.Module):
    """Groups, a stride, a transposed convolution, a one-dimensional one, a layer used twice, a linear on sequences."""

    def __init__(self):
        super().__init__()
        self.grouped = nn.Conv2d(4, 8, 3, stride=2, groups=2, bias=False)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.twice = nn.Conv2d(6, 6, 1)
        self.along = nn.Conv1d(6, 5, 3, padding=1)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = self.twice(self.twice(self.up(self.grouped(x))))
        x = self.along(x.flatten(2))
        return self.head(self.norm(x.transpose(1, 2)))


@pytest.mark.parametrize(
    ("build", "shape"), [(Mixed, (3, 4, 11, 9)), (models.vgg16_bn, (2, 3, 32, 32)), (models.vgg_digits, (1, 1, 16, 16))]
)
def test_macs_agree_with_the_flop_counter(build, shape):
    model = build().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(shape))
    found = measure.profile(model, torch.zeros(shape), latency=False)
    assert 2 * found.macs * shape[0] == counter.get_total_flops()
    assert found.macs == sum(layer.macs for layer in found.layers)
    assert found.parameters == sum(p.numel() for p in model.parameters())


def test_hrank_v1_counts_linear_biases_and_no_norms():
    found = measure.profile(Mixed(), torch.zeros(1, 4, 11, 9), latency=False)
    assert found.parameters - found.hrank_v1_parameters == 2 * 5  # the layer norm
    positions = 10 * 8  # of the sequence
    assert found.hrank_v1_macs - found.macs == 3 * positions


def test_profile_leaves_the_model_alone_and_survives_a_round_trip(tmp_path):
    model = models.vgg_digits(widths=(4, 4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = measure.profile(model, [torch.randn(3, 1, 16, 16)])
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert found.latency_ms > 0
    assert found.batch == 3
    found.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == found


def test_profile_says_what_does_not_fit():
    model = models.vgg_digits(widths=(4, 4))
    with pytest.raises(ValueError, match=r"profile: the model cannot take example_inputs of \[1, 3, 16, 16\] \("):
        measure.profile(model, torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"profile: the model cannot take example_inputs of \[1, 3, 16, 16\] \("):
        measure.profile(model, torch.zeros(1, 3, 16, 16), plan=Plan({"features.conv0": [0]}))
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(TypeError, match="profile: example_inputs must be a tensor"):
        measure.profile(model, [])
    with pytest.raises(ValueError, match=r"profile: .* no convolution named 'features.conv9'. Did you mean"):
        measure.profile(model, torch.zeros(1, 1, 16, 16), plan=Plan({"features.conv9": [0]}))
    with pytest.raises(ValueError, match=r"profile: 'features.conv0' has filters 0 to 3; the plan keeps 5"):
        measure.profile(model, torch.zeros(1, 1, 16, 16), plan=Plan({"features.conv0": [5]}))


# latencies


class Sleeper(nn.Module):
    def __init__(self, name, seconds, calls):
        super().__init__()
        self.name, self.seconds, self.calls = name, seconds, calls

    def forward(self, x):
        self.calls.append((self.name, self.training, torch.is_grad_enabled()))
        time.sleep(self.seconds)
        return x


def test_latencies_take_turns_warm_up_and_keep_their_order():
    calls = []
    models_ = [Sleeper("slow", 0.004, calls), Sleeper("fast", 0.0, calls)]
    slow, fast = measure.latencies(models_, torch.zeros(1), budget_s=0)
    assert slow >= 4 > fast
    assert "".join(name[0] for name, *_ in calls) == "sf" + "sffssf"
    assert not any(training or grad for _, training, grad in calls)
    assert all(model.training for model in models_)
    assert measure.latencies([], torch.zeros(1)) == []


def test_latencies_use_their_budget_and_report_the_median(monkeypatch):
    calls = []
    started = time.perf_counter()
    measure.latencies([Sleeper("one", 0.001, calls)], torch.zeros(1), budget_s=0.05)
    assert time.perf_counter() - started >= 0.05
    assert len(calls) > 5
    durations = iter([9.0, 5.0, 1.0, 7.0])
    monkeypatch.setattr(measure, "_timed", lambda model, inputs: next(durations))
    assert measure.latencies([nn.Identity()], torch.zeros(1), budget_s=0) == [5.0]  # the first was the warm-up


def test_device_is_named_for_people(monkeypatch):
    name = measure.device_name(torch.device("cpu"))
    assert name.endswith((" thread", " threads"))
    assert not name.startswith(",")
    monkeypatch.setattr(measure.Path, "read_text", lambda path: "flags : none\n")
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    assert measure.device_name(torch.device("cpu")).startswith("arm, ")


def test_loss_and_top1_agree_with_evaluate():
    scores, labels = torch.randn(9, 4), torch.arange(9) % 4
    full = measure.evaluate(nn.Identity(), batches(scores, labels))
    loss, top1 = measure.loss_and_top1("test", nn.Identity(), batches(scores, labels, 9))
    assert top1 == full.top1
    assert loss == pytest.approx(full.loss, abs=LOSS_FLOAT64)
    assert np.isfinite(loss)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "xpu"])
def test_a_device_that_is_not_there_is_refused_by_name(device):
    with pytest.raises(ValueError, match=f"device: torch cannot use '{device}' here .* Use 'cpu'"):
        measure.as_device(device)
    assert measure.as_device("cpu") == torch.device("cpu")
