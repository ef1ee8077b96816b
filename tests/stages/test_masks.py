import pytest
import torch
from torch import nn

from pyprune import models
from pyprune.masks import mask_
from pyprune.types import Plan

PLAN = Plan({"conv": [0, 2]})

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "sgd_nesterov_foreach": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, foreach=True),
    "sgd_fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 0.1),
    "adamw_fused": lambda p: torch.optim.AdamW(p, 0.1, fused=True),
}


class Net(nn.Module):
    """Leaky, so that gradients reach even a channel that is zero."""

    def __init__(self, affine=True):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4, affine=affine)
        self.act = nn.LeakyReLU(0.1)
        self.head = nn.Conv2d(4, 3, 3)

    def forward(self, x):
        return self.head(self.act(self.norm(self.conv(x)))).mean((2, 3))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def build(affine=True):
    net = Net(affine)
    if affine:
        nn.init.normal_(net.norm.weight)
        nn.init.normal_(net.norm.bias)
    return net


def step(net, optimizer):
    """Take a step with a gradient on every parameter."""
    optimizer.zero_grad()
    x = torch.randn(8, 1, 8, 8, dtype=net.conv.weight.dtype)
    (net(x).square().mean() + sum(p.sum() for p in net.parameters())).backward()
    optimizer.step()


def dead_values(net):
    """Return the numbers of filters 1 and 3, their biases and their norm slices."""
    tensors = (net.conv.weight, net.conv.bias, net.norm.weight, net.norm.bias)
    return torch.cat([tensor[[1, 3]].detach().flatten() for tensor in tensors])


def test_mask_zeroes_filter_bias_and_norm_slices_and_nothing_else():
    net = build()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    masks = mask_(net, PLAN)
    for name in ("conv.weight", "conv.bias", "norm.weight", "norm.bias"):
        before[name][[1, 3]] = 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert masks.zeros == 2 * (9 + 1 + 1 + 1) == dead_values(net).numel()
    assert masks.kept == {}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_masks_hold_through_training_only_while_attached(kind):
    net = build()
    masks = mask_(net, PLAN)
    optimizer = OPTIMIZERS[kind](net.parameters())
    assert masks.attach(optimizer) is masks
    alive = net.conv.weight[0].clone()
    for _ in range(3):
        step(net, optimizer)
        assert not dead_values(net).any()
    assert not torch.equal(net.conv.weight[0], alive)
    masks.remove()
    step(net, optimizer)
    assert dead_values(net).all()  # without the hook every one of them comes back to life


def test_momentum_alone_revives_a_filter_without_attach():
    """The filter is zeroed in mid-training and its gradient stops, but the momentum goes on."""
    revived = {}
    for attach in (False, True):
        torch.manual_seed(0)
        net = build()
        optimizer = OPTIMIZERS["sgd"](net.parameters())
        step(net, optimizer)
        masks = mask_(net, PLAN)
        if attach:
            masks.attach(optimizer)
        for parameter in net.parameters():
            parameter.grad.zero_()
        optimizer.step()
        revived[attach] = bool(dead_values(net).any())
    assert revived == {False: True, True: False}


def test_attach_needs_no_other_reference():
    net = build()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    mask_(net, PLAN).attach(optimizer)
    step(net, optimizer)
    assert not dead_values(net).any()


def test_two_optimizers_and_reapply():
    net = build()
    masks = mask_(net, PLAN)
    first, second = (torch.optim.SGD(part.parameters(), 0.1) for part in (net.conv, net.norm))
    masks.attach(first).attach(second)
    step(net, first)
    assert not dead_values(net).any()
    second.step()
    assert not dead_values(net).any()
    masks.remove()
    with torch.no_grad():
        net.conv.weight.fill_(1)
    masks.reapply()
    assert not dead_values(net).any()
    assert net.conv.weight[0].all()


def test_parameters_may_be_converted_moved_or_replaced():
    net = build()
    masks = mask_(net, PLAN)
    net.double()
    net.conv.weight = nn.Parameter(torch.ones_like(net.conv.weight))
    masks.reapply()
    assert not dead_values(net).any()
    assert net.conv.weight.dtype == torch.float64
    net.half()
    masks.reapply()
    assert net.conv.weight.requires_grad
    net.to("meta")
    masks.reapply()  # indices follow the device


def test_masks_say_when_their_parameter_has_gone():
    net = build()
    masks = mask_(net, PLAN)
    net.conv = nn.Conv2d(1, 2, 3)
    with pytest.raises(ValueError, match=r"'conv.weight' must have more than 3 rows; it has shape \[2, 1, 3, 3\]"):
        masks.reapply()
    del net.norm
    net.conv = nn.Conv2d(1, 4, 3)
    with pytest.raises(ValueError, match=r"Masks: the model has no parameter 'norm.weight' any more"):
        masks.reapply()


def test_skipped_steps_of_mixed_precision_change_nothing():
    net = build()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    mask_(net, PLAN).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for bad in (False, True, False):
        optimizer.zero_grad()
        before = net.conv.weight.detach().clone()
        scaler.scale(net(torch.randn(4, 1, 8, 8)).square().mean()).backward()
        if bad:
            net.head.weight.grad[0, 0, 0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, net.conv.weight) == bad
        assert not dead_values(net).any()


def test_filters_that_no_mask_can_silence_stay_and_are_named():
    net = build(affine=False)
    before = net.conv.weight.detach().clone()
    masks = mask_(net, PLAN)
    assert torch.equal(net.conv.weight, before)
    assert masks.zeros == 0
    assert sorted(masks.kept["conv"]) == [1, 3]
    assert "norm" in masks.kept["conv"][1]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan({"conv": [0, 4]}), r"mask_: 'conv' has filters 0 to 3; the plan keeps 4"),
        (Plan({"conv": [0], "konv": [0]}), r"mask_: the model has no convolution named 'konv'. Did you mean 'conv'"),
        (Plan({"conv": [0]}, filters={"conv": 5}), r"the plan is for another model: 'conv' has 4 filters here and 5"),
    ],
)
def test_a_plan_for_another_model_changes_nothing(plan, message):
    net = build()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        mask_(net, plan)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_attach_refuses_what_is_no_optimizer_of_the_model():
    net = build()
    masks = mask_(net, PLAN)
    with pytest.raises(TypeError, match=r"Masks.attach: needs a torch optimizer; got list"):
        masks.attach([])
    with pytest.raises(ValueError, match=r"Masks.attach: the optimizer must train the masked model"):
        masks.attach(torch.optim.SGD(build().parameters(), 0.1))
    net.requires_grad_(False)
    net.head.requires_grad_(True)
    masks.attach(torch.optim.SGD(net.head.parameters(), 0.1))


def test_masked_channels_are_zero_behind_the_activation():
    """On VGG with the running statistics of use: the channel reaches the next layer as exact zeros."""
    model = models.vgg_digits(widths=(4, 4))
    model(torch.randn(8, 1, 16, 16))
    model.eval()
    seen = []
    model.features.conv1.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    x = torch.randn(2, 1, 16, 16)
    model(x)
    assert seen[0][:, 1].any()
    mask_(model, Plan({"features.conv0": [0, 2, 3]}))
    model(x)
    assert not seen[1][:, 1].any()
    assert seen[1][:, 0].any()


class Branches(nn.Module):
    """Its way depends on a size, which torch.fx cannot follow."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        y = self.norm(self.a(x))
        return self.b(y.relu()) if x.shape[2] > 4 else self.b(y)


def test_a_model_that_torch_fx_cannot_trace_is_masked_by_running_it():
    model = Branches()
    with pytest.raises(ValueError, match=r"mask_: Branches cannot be traced by torch\.fx .* Or pass example_inputs\."):
        mask_(model, Plan({"a": [0, 2]}))
    masks = mask_(model, Plan({"a": [0, 2]}), torch.randn(2, 2, 8, 8))
    assert set(masks.dead) == {"a.weight", "a.bias", "norm.weight", "norm.bias"}
    assert all(rows.tolist() == [1, 3] for rows in masks.dead.values())
    assert model.norm.weight.tolist() == [1, 0, 1, 0]
    with pytest.raises(ValueError, match="mask_: Branches does not accept example_inputs"):
        mask_(model, Plan({"a": [0]}), torch.randn(2, 3, 8, 8))
