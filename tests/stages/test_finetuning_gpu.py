"""What only a GPU can show: mixed precision by itself, moving there and back, the random state of the device."""

import pytest
import torch
from torch import nn

from pyprune import data, measure, models
from pyprune.finetuning import finetune
from pyprune.masks import mask_
from pyprune.types import Plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_finetune_on_the_gpu_learns_in_low_precision_and_brings_the_model_back():
    splits = data.digits()
    torch.manual_seed(0)
    model = models.vgg_digits()
    masks = mask_(model, Plan({"features.conv0": range(0, 32, 2)}))
    seen = set()
    model.classifier.linear.register_forward_hook(
        lambda module, args, output: seen.add((module.training, output.dtype))
    )
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    history = finetune(
        model, data.loader(splits.train, shuffle=True), data.loader(splits.val), masks=masks,
        epochs=4, lr=0.05, device="cuda",
    )  # fmt: skip
    assert torch.equal(state, torch.cuda.get_rng_state())
    assert measure.model_device(model).type == "cpu"
    assert not model.features.conv0.weight[1::2].any()
    assert (False, torch.float32) in seen
    assert any(training and dtype in (torch.bfloat16, torch.float16) for training, dtype in seen)
    assert history.epochs[history.best - 1].val_top1 > 0.9
    cpu, cuda = (measure.evaluate(model, data.loader(splits.test), device=place) for place in ("cpu", "cuda"))
    assert cpu.top1 == pytest.approx(cuda.top1, abs=0.01)


def test_masks_follow_the_parameters_to_the_gpu_under_every_implementation():
    for options in ({"foreach": True}, {"fused": True}, {}):
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        masks = mask_(model, Plan({"0": [0, 2]}))
        model.cuda()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1, **options)
        masks.attach(optimizer)
        for _ in range(2):
            optimizer.zero_grad()
            sum(parameter.sum() for parameter in model.parameters()).backward()
            optimizer.step()
        assert not model[0].weight[[1, 3]].any()
        assert model[0].weight[0].any()


def test_latency_waits_for_the_gpu():
    model = nn.Sequential(*[nn.Conv2d(64, 64, 3, padding=1) for _ in range(20)]).cuda()
    x = torch.randn(64, 64, 64, 64)
    (found,) = measure.latencies([model], x)
    flops = 2 * 20 * 64 * 64 * 9 * 64 * 64 * 64
    assert found > flops / 2e15 * 1e3  # faster than any device computes: it would not have been waited for
    assert torch.cuda.get_device_name() in measure.profile(model, x[:1]).device
