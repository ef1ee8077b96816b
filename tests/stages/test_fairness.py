"""Fairness: the thesis's own table, fairlearn-like sums by hand, streaming, files, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, multilabel_confusion_matrix, roc_auc_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyprune as pp
from pyprune import equity
from pyprune.types import Fairness
from tolerances import FROZEN_LOGITS, MEAN_OF_RATIOS, TABLE_ROUNDED

# Thesis table 5.8, VGG-16 on CIFAR-10: TPR, TNR, FPR before; TPR, TNR, FPR after.
TABLE = np.array([
    [0.952, 0.992222, 0.007778, 0.890, 0.984556, 0.015444],
    [0.964, 0.997000, 0.003000, 0.933, 0.993111, 0.006889],
    [0.910, 0.991778, 0.008222, 0.826, 0.982667, 0.017333],
    [0.871, 0.986222, 0.013778, 0.733, 0.975556, 0.024444],
    [0.942, 0.993667, 0.006333, 0.873, 0.986222, 0.013778],
    [0.908, 0.988666, 0.011333, 0.814, 0.979666, 0.02033],
    [0.956, 0.99522, 0.004777, 0.922, 0.987889, 0.01211],
    [0.963, 0.99688, 0.00311, 0.922, 0.99033, 0.009666],
    [0.963, 0.9958, 0.004111, 0.9388, 0.99055, 0.009444],
    [0.967, 0.995333, 0.004666, 0.903, 0.9911, 0.009],
])  # fmt: skip


def test_the_numbers_of_the_thesis_recomputed():
    found = equity.equality(TABLE[:, :3], TABLE[:, 3:])
    assert found["eopp0"] == pytest.approx(0.0711, abs=TABLE_ROUNDED)
    assert found["eopp1"] == pytest.approx(0.6412, abs=TABLE_ROUNDED)
    assert found["eodd"] == pytest.approx(0.5699, abs=TABLE_ROUNDED)
    # The thesis prints 0.7101 for EOdd: close to the form that adds the changes' absolute values, not to its eq. 5.6.
    assert found["eodd_separate"] == pytest.approx(0.7125, abs=TABLE_ROUNDED)
    disturbed = TABLE.copy()
    disturbed[3, 3] += 0.001
    other = equity.equality(disturbed[:, :3], disturbed[:, 3:])
    assert abs(other["eopp1"] - 0.6412) > TABLE_ROUNDED


def evaluation(confusion, **more):
    return pp.Evaluation(np.array(confusion, np.int64), 0.5, None, None, **more)


# Class 0: 10 images, 8 right, 1 other called 0. Class 1: 20, 16 right, 2 wrongly. Class 2: 10, 9 right, 4.
BEFORE = [[8, 1, 1], [1, 16, 3], [0, 1, 9]]
# After: 5 of 10, 16 of 20, 10 of 10.
AFTER = [[5, 2, 3], [1, 16, 3], [0, 0, 10]]


def test_rates_and_sums_by_hand():
    result = pp.fairness(evaluation(BEFORE), evaluation(AFTER))
    # TPR .8, .8, .9 -> .5, .8, 1. FPR: 1/30, 2/20, 4/30 -> 1/30, 2/20, 6/30.
    np.testing.assert_allclose(result.before[:, 0], [0.8, 0.8, 0.9])
    np.testing.assert_allclose(result.before[:, 2], [1 / 30, 2 / 20, 4 / 30])
    np.testing.assert_allclose(result.after[:, 2], [1 / 30, 2 / 20, 6 / 30])
    np.testing.assert_allclose(result.before[:, 1] + result.before[:, 2], 1)
    assert result.eopp1 == pytest.approx(0.3 + 0 + 0.1)
    assert result.eopp0 == pytest.approx(2 / 30)
    assert result.eodd == pytest.approx(0.3 + 0 + (0.1 + 2 / 30))
    assert result.eodd_separate == pytest.approx(0.4 + 2 / 30)
    # Attainable are K = 3 and 2K = 6: .4 / 3 = 13.3 % is moderate, .067 / 3 = 2.2 % and .467 / 6 = 7.8 % are fair.
    assert result.ranges == {"eopp0": (3, 6), "eopp1": (3, 6), "eodd": (6, 12), "eodd_separate": (6, 12)}
    assert result.verdicts == {"eopp0": "fair", "eopp1": "moderate", "eodd": "fair", "eodd_separate": "fair"}
    # Errors: class 0 gains .3, class 2 loses .1: the largest difference is .4.
    assert result.errors.losses == pytest.approx({"0": 0.3, "1": 0, "2": -0.1})
    assert result.errors.largest == pytest.approx(0.4)
    assert result.errors.between == ("2", "0")
    assert result.losses is None


def test_odds_of_two_kinds_part_where_changes_cancel():
    # Everything called 0 before and 1 after: TPR of class 0 falls by 1 and its FPR, too; for class 1 both rise.
    result = pp.fairness(evaluation([[4, 0], [4, 0]]), evaluation([[0, 4], [0, 4]]))
    assert (result.eopp0, result.eopp1, result.eodd, result.eodd_separate) == (2, 2, 4, 4)
    assert set(result.verdicts.values()) == {"unfair"}
    # Class 0 right and wrong the other way round: TPR falls by 1, FPR rises by 1; eq. 5.6 sees nothing.
    result = pp.fairness(evaluation([[4, 0], [0, 4]]), evaluation([[0, 4], [4, 0]]))
    assert (result.eodd, result.eodd_separate) == (0, 4)


@pytest.mark.parametrize(("share", "verdict"), [(0, "fair"), (0.0999, "fair"), (0.1, "moderate"), (0.25, "unfair")])
def test_verdicts(share, verdict):
    assert Fairness.verdict(share) == verdict


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6), st.integers(0, 10**6))
def test_what_always_holds(K, seed):
    rng = np.random.default_rng(seed)
    truth = np.concatenate([np.arange(K), rng.integers(0, K, 60)])
    calls = [rng.integers(0, K, len(truth)) for _ in range(2)]
    confusions = [np.bincount(truth * K + call, minlength=K * K).reshape(K, K) for call in calls]
    result = pp.fairness(*map(evaluation, confusions))
    for name, (most, thesis) in result.ranges.items():
        assert 0 <= getattr(result, name) <= most < thesis
    assert result.eodd <= result.eodd_separate + 1e-12
    assert result.eopp0 + result.eopp1 == pytest.approx(result.eodd_separate)
    for rates, call in zip((result.before, result.after), calls, strict=True):
        for (tn, fp), (fn, tp) in multilabel_confusion_matrix(truth, call):
            assert any(np.allclose(row, [tp / (tp + fn), tn / (tn + fp), fp / (tn + fp)]) for row in rates)
    same = pp.fairness(evaluation(confusions[0]), evaluation(confusions[0]))
    assert (same.eopp0, same.eopp1, same.eodd, same.errors.largest) == (0, 0, 0, 0)


def test_correlations():
    # TPRs .2, .4, .6, .8 and .1, .3, .2, .9: ranks 1 2 3 4 and 1 3 2 4, d^2 = 2, rho = 1 - 6 * 2 / (4 * 15) = .8.
    def of(hits):
        return evaluation([[h if c == r else (10 - h if c == (r + 1) % 4 else 0) for c in range(4)]
                           for r, h in enumerate(hits)])  # fmt: skip

    result = pp.fairness(of([2, 4, 6, 8]), of([1, 3, 2, 9]))
    assert result.spearman.coefficient == pytest.approx(0.8)
    assert result.pearson.coefficient == pytest.approx(np.corrcoef([2, 4, 6, 8], [1, 3, 2, 9])[0, 1])
    assert 0 < result.pearson.p < 0.2
    # Four points: rho = .8 has p = 2 * P(t_2 > .8 sqrt(2 / .36)) = .2.
    assert result.spearman.p == pytest.approx(0.2)
    constant = pp.fairness(of([5, 5, 5, 5]), of([1, 3, 2, 9]))
    assert constant.pearson.coefficient is None
    assert "Pearson                   not defined" in str(constant)


def classifier(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 4))


def images(count=57):
    torch.manual_seed(1)
    return torch.randn(count, 1, 2, 3), torch.arange(count) % 4


def test_losses_of_classes_and_groups_are_streamed():
    x, y = images()
    kind = ["young" if i % 3 else "old" for i in range(57)]
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    before, after = (
        pp.evaluate(classifier(seed), loader, attributes={"age": kind, "site": np.arange(57) // 20}, progress=False)
        for seed in (0, 1)
    )
    with torch.no_grad():
        shares = [classifier(seed)(x).double().softmax(1).numpy() for seed in (0, 1)]
    for found, share in ((before, shares[0]), (after, shares[1])):
        for c in range(4):
            mine = y.numpy() == c
            loss = log_loss(y.numpy()[mine], share[mine], labels=range(4))
            assert found.class_loss[c] == pytest.approx(loss, abs=FROZEN_LOGITS)
            assert found.class_auc[c] == pytest.approx(roc_auc_score(mine, share[:, c]), abs=MEAN_OF_RATIOS)
        old = np.array(kind) == "old"
        assert found.groups["age"]["old"].images == old.sum() == 19
        assert found.groups["age"]["old"].loss == pytest.approx(
            log_loss(y.numpy()[old], share[old], labels=range(4)), abs=FROZEN_LOGITS
        )
        assert found.groups["age"]["old"].top1 == pytest.approx((share.argmax(1) == y.numpy())[old].mean())
        assert list(found.groups["site"]) == ["0", "1", "2"]
        assert np.average(found.class_loss, weights=found.confusion.sum(1)) == pytest.approx(found.loss)
    result = pp.fairness(before, after)
    assert result.losses.losses["2"] == pytest.approx(after.class_loss[2] - before.class_loss[2])
    age = result.groups["age"]
    change = {name: after.groups["age"][name].loss - before.groups["age"][name].loss for name in ("old", "young")}
    assert age.losses == pytest.approx(change)
    assert age.largest == pytest.approx(abs(change["old"] - change["young"]))
    assert list(result.groups) == ["age", "site"]
    assert result.auc == (before.auc, after.auc)


def test_fairness_survives_a_file(tmp_path):
    x, y = images()
    before, after = (
        pp.evaluate(classifier(seed), [(x, y)], attributes={"half": [0] * 30 + [1] * 27}, progress=False)
        for seed in (0, 1)
    )
    before.save(tmp_path / "before.json")
    loaded = pp.Evaluation.load(tmp_path / "before.json")
    assert loaded.groups == before.groups
    np.testing.assert_array_equal(loaded.class_loss, before.class_loss)
    result = pp.fairness(loaded, after)
    result.save(tmp_path / "fairness.json")
    again = pp.Fairness.load(tmp_path / "fairness.json")
    assert again.to_json() == result.to_json()
    assert str(again) == str(result)
    assert "EOdd, eq. 5.6" in str(result)
    (tmp_path / "fairness.json").write_text('{"format": "pyprune.fairness", "version": 1}')
    with pytest.raises(ValueError, match=r"Fairness.load: .* lacks or garbles"):
        pp.Fairness.load(tmp_path / "fairness.json")


def test_evaluations_of_before_are_still_judged():
    old = evaluation(BEFORE)
    assert pp.fairness(old, evaluation(AFTER, class_loss=np.array([0.1, 0.2, 0.3]))).losses is None


def test_classes_without_images_are_left_out():
    result = pp.fairness(evaluation([[3, 1, 0], [0, 0, 0], [1, 0, 5]]), evaluation([[4, 0, 0], [0, 0, 0], [0, 1, 5]]))
    assert result.classes == (0, 2)
    assert np.isfinite(result.after).all()
    assert list(result.errors.losses) == ["0", "2"]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (evaluation(BEFORE), evaluation([[1, 0], [0, 1]]), "both must have the same classes; got 3 and 2"),
        (evaluation(BEFORE), evaluation([[9, 1, 1], [1, 16, 3], [0, 1, 9]]), "class 0 has 10 and 11. Evaluate both"),
        (evaluation([[3, 1], [0, 0]]), evaluation([[3, 1], [0, 0]]), "images of at least two classes; got those of 1"),
    ],
)
def test_what_cannot_be_compared(before, after, message):
    with pytest.raises(ValueError, match=message):
        pp.fairness(before, after)


def test_attributes_that_do_not_fit():
    x, y = images(8)
    for values, message in (([1] * 7, "has 7 values, and there are more images"), ([1] * 9, "9 values for 8 images")):
        with pytest.raises(ValueError, match=message):
            pp.evaluate(classifier(), [(x, y)], attributes={"a": values}, progress=False)
    shuffling = DataLoader(TensorDataset(x, y), shuffle=True)
    with pytest.raises(ValueError, match="attributes come in the loader's order, and this one shuffles"):
        pp.evaluate(classifier(), shuffling, attributes={"a": [1] * 8}, progress=False)
    with pytest.raises(TypeError, match=r"needs two results of pyprune.evaluate; got dict"):
        pp.fairness({}, {})
