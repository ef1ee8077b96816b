"""Searching widths: what lambda and validation propose, bad input, runs that diverge, being killed anywhere."""

import functools
import itertools
import json
import math
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import pyprune as pp
from pyprune import widths as searches
from pyprune.files import fingerprint, read_tensors
from pyprune.finetuning import Diverged
from pyprune.redundancy import distinct_filters
from pyprune.searching import WidthSearch

START = {"a": 16, "b": 16}


def build(widths: Mapping[str, int]) -> nn.Module:
    """Two 3x3 convolutions behind a 1x1 one that gives them channels, so that random kernels have lambda 0."""
    return nn.Sequential(
        nn.Conv2d(1, 24, 1), nn.Conv2d(24, widths["a"], 3), nn.Conv2d(widths["a"], widths["b"], 3), nn.Flatten(1)
    )


def copies(**distinct: int) -> Callable[[nn.Module], None]:
    """Return a training after which a layer has so many distinct kernels, and copies of these."""

    def train(model: nn.Module) -> None:
        for name, number in distinct.items():
            weight = model[{"a": 1, "b": 2}[name]].weight  # type: ignore[index]
            with torch.no_grad():
                weight.copy_(weight[torch.arange(len(weight)) % number])

    return train


def search(train=lambda model: None, evaluate=lambda model: 1.0, **more) -> WidthSearch:
    return pp.optimize_widths(build, train, evaluate, **{"widths": START, "runs": 1, "progress": False, **more})


def path(found: WidthSearch) -> list[tuple[int, ...]]:
    return [tuple(step.widths.values()) for step in found.steps]


def width(model: nn.Module, index: int) -> int:
    return model[index].out_channels  # type: ignore[index]


# What is proposed


def test_a_redundant_width_goes_to_the_number_of_distinct_filters_and_stays_there():
    found = search(copies(a=10), silent="keep")
    assert path(found) == [(16, 16), (10, 16)]
    assert found.redundancy(found.steps[0], "a") == pytest.approx(6 / 120)  # six pairs of copies
    assert found.redundancy(found.steps[1], "a") == 0
    assert found.stopped == "no width is redundant any more, and nothing narrower is left to try"
    assert found.steps[1].why["a"] == "lambda 0.0500 in 1, 0.0000 by chance: 10 of 16 filters are distinct"
    assert found.steps[1].why["b"] == "stays: lambda says nothing"
    assert found.notes == (
        "from the start lambda is at most 0.01 above that of random kernels in b: it says nothing about these widths, "
        "which are left as they are.",
    )
    assert found.widths == {"a": 10, "b": 16}
    assert found.narrow.parameters == sum(p.numel() for p in build({"a": 10, "b": 16}).parameters())


def test_a_step_takes_an_eighth_at_least_and_the_share_of_shrink_at_most():
    assert path(search(copies(a=15), silent="keep", budget=2, target=0.0)) == [(16, 16), (14, 16)]
    assert path(search(copies(a=2), silent="keep", budget=3)) == [(16, 16), (8, 16), (4, 16)]
    assert path(search(copies(a=2), silent="keep", budget=2, shrink=0.7)) == [(16, 16), (12, 16)]


def test_a_width_below_the_smallest_stays():
    found = search(copies(a=2), silent="keep", smallest=12)
    assert path(found) == [(16, 16), (12, 16)]
    assert found.stopped == "nothing narrower is left to try; still redundant: a (lambda 0.4545)"
    assert found.steps[1].why["a"].endswith("; no fewer than 12")


def test_widths_are_multiples():
    assert path(search(copies(a=9), silent="keep", round_to=4, budget=2)) == [(16, 16), (12, 16)]
    assert path(search(copies(a=2), silent="keep", round_to=4, smallest=9)) == [(16, 16), (12, 16)]


def test_where_lambda_says_nothing_validation_decides():
    found = search(evaluate=lambda model: min(width(model, 2), 6) / 6, budget=8, patience=3, smallest=2)
    assert path(found)[:3] == [(16, 16), (8, 8), (4, 4)]
    assert [step.holds for step in found.steps[:3]] == [True, True, False]
    assert path(found)[3] == (6, 6)  # between 4, where it fell, and 8
    assert found.steps[3].why["b"] == "validation fell at 4, and held at 8"
    assert found.steps[3].holds
    assert found.widths == {"a": 5, "b": 6} or found.widths["b"] == 6
    assert "narrowed under the validation tolerance alone" in found.notes[0]


def test_what_lambda_did_not_ask_for_widens_first():
    found = search(copies(a=8), evaluate=lambda model: float(width(model, 2) >= 12), budget=3)
    assert path(found) == [(16, 16), (8, 8), (8, 12)]
    assert [step.holds for step in found.steps] == [True, False, True]
    assert found.steps[2].why == {"a": "stays", "b": "validation fell at 8, and held at 16"}


def test_the_search_stops_early_where_validation_keeps_falling():
    found = search(evaluate=lambda model: float(width(model, 1) == 16), budget=20)
    assert [step.holds for step in found.steps] == [True, False, False]
    assert found.stopped == "validation fell in 2 steps in a row"
    assert found.widths == START
    assert found.narrow is found.standard


def test_the_tolerance_is_of_the_mean_over_the_runs():
    noise = itertools.cycle([0.04, -0.04])

    def evaluate(model: nn.Module) -> float:
        return 0.9 - 0.02 * (width(model, 1) < 16) + next(noise)

    assert [step.holds for step in search(evaluate=evaluate, runs=2, budget=4, tolerance=0.021).steps] == [True, True]
    assert [step.holds for step in search(evaluate=evaluate, runs=2, budget=4, tolerance=0.019).steps] == [True, False]


def test_coupled_widths_stay_equal():
    found = search(copies(a=8), coupled=[("a", "b")], budget=4)
    assert all(a == b for a, b in path(found))
    assert len(found.steps) > 1


@pytest.mark.parametrize(("budget", "steps"), [(2, 1), (3, 1), (4, 2), (5, 2), (6, 3)])
def test_the_budget_counts_trainings(budget: int, steps: int):
    trained = []
    found = search(trained.append, runs=2, budget=budget, smallest=2)
    assert len(found.steps) == steps
    assert len(trained) == found.trainings == 2 * steps <= budget
    assert found.stopped == f"the budget is spent: {2 * steps} of {budget} trainings"


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    least=st.tuples(st.integers(1, 20), st.integers(1, 20)), distinct=st.integers(1, 16),
    shrink=st.sampled_from([0.25, 0.5, 0.8]), round_to=st.sampled_from([1, 4]),
    silent=st.sampled_from(["narrow", "keep"]),
)  # fmt: skip
def test_whatever_validation_says(least, distinct, shrink, round_to, silent):
    def evaluate(model: nn.Module) -> float:
        return float(width(model, 1) >= min(least[0], 16) and width(model, 2) >= min(least[1], 16))

    found = search(
        copies(a=distinct), evaluate, shrink=shrink, round_to=round_to, silent=silent, budget=12, smallest=2, patience=4
    )
    steps = found.steps
    assert found.narrow.holds
    assert all(number % round_to == 0 for step in path(found) for number in step)
    assert len(set(path(found))) == len(steps)  # nothing is trained twice
    for before, after in itertools.pairwise(steps):
        wider = [name for name in START if after.widths[name] > before.widths[name]]
        assert not wider or not before.holds  # lambda alone never widens
        assert max(after.widths.values()) <= 16
    for name, number in found.widths.items():
        assert number >= min(dict(zip(START, least, strict=True))[name], 16)


# Runs


def test_every_run_has_its_seed_and_the_caller_keeps_his_random_states():
    drawn = []

    def train(model: nn.Module, seed: int) -> None:
        drawn.append((seed, float(torch.rand(())), random.random(), float(np.random.rand())))  # noqa: NPY002, S311

    def states() -> list[object]:
        return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]  # noqa: NPY002

    before = states()
    found = search(train, runs=3, budget=6, seed=7)
    assert states() == before
    assert [seed for seed, *_ in drawn] == [7, 8, 9] * 2
    assert [run.seed for run in found.standard.runs] == [7, 8, 9]
    assert drawn[:3] != drawn[3:]  # other widths draw other weights first
    assert len({one[1:] for one in drawn[:3]}) == 3
    weights = [run.redundancy.layers()["1"].mean for run in found.standard.runs]
    assert len(set(weights)) == 3  # three networks
    again = search(lambda model, seed: None, runs=3, budget=3, seed=7)
    assert [run.redundancy.layers()["1"].mean for run in again.standard.runs] == weights


def test_train_is_given_what_it_asks_for(tmp_path: Path):
    asked = []

    def train(model: nn.Module, *, seed: int = 5, checkpoint: Path | None = None, other: int = 3) -> None:
        asked.append((seed, checkpoint, other))

    search(train, budget=1, folder=tmp_path / "one")
    search(functools.partial(train, seed=11, other=4), budget=1)
    assert asked == [(0, tmp_path / "one" / "step_0" / "run_0_0.training.safetensors", 3), (11, None, 4)]


@pytest.mark.parametrize(
    ("returned", "metric", "expected"),
    [
        (0.5, None, ("score", {"score": 0.5})),
        (torch.tensor(0.5), None, ("score", {"score": 0.5})),
        ({"auc": 0.75, "top1": np.float32(0.5)}, None, ("auc", {"auc": 0.75, "top1": 0.5})),
        ({"auc": 0.75, "top1": 0.5}, "top1", ("top1", {"auc": 0.75, "top1": 0.5})),
        (pp.Evaluation(np.diag([3, 1]), 0.1, None, 0.875), None, ("auc", {"auc": 0.875, "top1": 1.0})),
        (pp.Evaluation(np.diag([3, 0]), 0.1, None, None), None, ("top1", {"top1": 1.0})),
    ],
)
def test_scores_come_in_several_forms(returned, metric, expected):
    found = search(evaluate=lambda model: returned, metric=metric, budget=1)
    assert (found.metric, dict(found.standard.runs[0].validation)) == expected


def test_test_scores_are_kept_and_decide_nothing():
    scores = itertools.count()
    found = search(test=lambda model: {"auc": next(scores)}, runs=2, budget=4)
    assert [step.test("auc").tolist() for step in found.steps] == [[0, 1], [2, 3]]
    assert found.metric == "score"
    assert found.tests == ("auc",)
    assert found.anova("auc").f == pytest.approx(8)
    assert "test auc" in str(found)


def test_a_stage_of_a_real_network_is_measured_in_all_its_layers():
    found = pp.optimize_widths(
        lambda widths: pp.models.resnet20(widths=widths), lambda model: None, lambda model: 1.0,
        widths=pp.models.standard.standard_widths("resnet20"), runs=1, budget=2, progress=False,
    )  # fmt: skip
    assert found.layers["layer1"] == ("conv1", *(f"layer1.{k}.conv{i}" for k in range(3) for i in (1, 2)))
    assert list(found.layers) == ["layer1", "layer2", "layer3"]
    assert path(found) == [(16, 32, 64), (8, 16, 32)]


def test_distinct_filters_have_lambda_zero_among_themselves():
    model = build({"a": 16, "b": 12})
    copies(a=5, b=12)(model)
    assert distinct_filters(model) == {"1": 5, "2": 12}
    assert distinct_filters(model, threshold=0.0)["2"] == 1  # all alike
    grouped = nn.Conv2d(8, 8, 3, groups=2)
    with torch.no_grad():
        grouped.weight.copy_(grouped.weight[:1].expand_as(grouped.weight))
    assert distinct_filters(grouped) == {"weights": 2}  # one of each group
    with pytest.raises(ValueError, match=r"distinct_filters: needs one network; got 2\."):
        distinct_filters([model, model])


# Bad input


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"budget": 0}, "budget must be a whole number of at least 1; got 0."),
        ({"runs": 3, "budget": 2}, "budget must allow the 3 runs of the standard network; got 2 trainings."),
        ({"smallest": 1}, "smallest must be a whole number of at least 2; got 1."),
        ({"widths": {"a": 1, "b": 1}}, "no width belongs to a 2-d convolution with pairs of kernels larger than 1x1"),
        ({"runs": 0}, "runs must be a whole number of at least 1; got 0."),
        ({"shrink": 1.0}, "shrink must lie between 0 and 1; got 1.0."),
        ({"threshold": 1.5}, "threshold must be at least 0 and at most 1; got 1.5."),
        ({"tolerance": -0.1}, "tolerance must be at least 0 and finite; got -0.1."),
        ({"tolerance": math.nan}, "tolerance must be at least 0 and finite; got nan."),
        ({"eps": 0.0}, "eps must be positive and finite; got 0.0."),
        ({"silent": "shrink"}, "silent must be 'narrow' or 'keep'; got 'shrink'."),
        ({"seed": 1.5}, "seed must be a whole number; got 1.5."),
        ({"widths": {}}, "widths must map at least one name to its filters; got {}."),
        ({"widths": {"a": 16, "b": 0}}, "widths must be whole numbers of at least 1, by name; got 'b': 0."),
        ({"coupled": ["a"]}, "coupled must hold groups of names; got 'a'. Put it in a list."),
        ({"coupled": [("a", "bb")]}, "coupled names no width 'bb'. Did you mean 'b'?"),
        (
            {"widths": {"a": 16, "b": 12}, "coupled": [("a", "b")]},
            "coupled widths must be equal, and these are not: a 16, b 12.",
        ),
        ({"metric": "auc"}, "evaluate must return 'auc', which decides; it returned score."),
        ({"evaluate": lambda model: {}}, "evaluate must return at least one score; it returned none."),
        ({"evaluate": lambda model: "good"}, "evaluate must return a number, numbers by name, or a pyprune Evaluation"),
        ({"evaluate": lambda model: torch.ones(2)}, "evaluate must return a number, numbers by name"),
        ({"widths": {**START, "c": 4}}, "build must use every width; c = 2 instead of 4 changed nothing."),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(more, message):
    with pytest.raises((ValueError, TypeError), match=re.escape(f"optimize_widths: {message}")):
        search(**more)


def test_a_build_that_needs_coupling_says_so():
    def residual(widths: Mapping[str, int]) -> nn.Module:
        if widths["a"] != widths["b"]:
            raise RuntimeError("sizes differ")
        return build(widths)

    with pytest.raises(ValueError, match=r"build failed with a = 8 and all others as given\. Every width must be free: "
                       r"couple it with .* \(RuntimeError: sizes differ\)"):  # fmt: skip
        pp.optimize_widths(residual, lambda model: None, lambda model: 1.0, widths=START)
    found = pp.optimize_widths(
        residual, lambda model: None, lambda model: 1.0, widths=START, coupled=[("a", "b")], runs=1, budget=2
    )
    assert path(found) == [(16, 16), (8, 8)]


def test_a_build_that_fails_at_once_or_later():
    with pytest.raises(ValueError, match=r"build failed for widths \{'a': 16\} \(KeyError: 'b'\)"):
        pp.optimize_widths(build, lambda model: None, lambda model: 1.0, widths={"a": 16})

    def picky(widths: Mapping[str, int]) -> nn.Module:
        if widths["a"] == widths["b"] == 8:
            raise RuntimeError("not eight")
        return build(widths)

    with pytest.raises(ValueError, match=r"build failed for widths \{'a': 8, 'b': 8\} \(RuntimeError: not eight\)"):
        pp.optimize_widths(picky, lambda model: None, lambda model: 1.0, widths=START, runs=1)


def test_other_builds_that_cannot_be_searched():
    model = build(START)
    with pytest.raises(ValueError, match="build must return a new network each time; it returned the same one"):
        pp.optimize_widths(lambda widths: model, lambda model: None, lambda model: 1.0, widths=START)
    with pytest.raises(TypeError, match=r"build must return a torch\.nn\.Module; it returned dict\."):
        pp.optimize_widths(dict, lambda model: None, lambda model: 1.0, widths=START)

    def pointwise(widths: Mapping[str, int]) -> nn.Module:
        return nn.Conv2d(3, widths["a"], 1)

    with pytest.raises(ValueError, match=r"optimize_widths: needs a 2-d convolution with kernels larger than 1x1"):
        pp.optimize_widths(pointwise, lambda model: None, lambda model: 1.0, widths={"a": 16})

    def fixed(widths: Mapping[str, int]) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, widths["a"], 1), nn.Conv2d(widths["a"], 4, 3))

    with pytest.raises(ValueError, match=r"no width belongs to a 2-d convolution .* Free those of 1\."):
        pp.optimize_widths(fixed, lambda model: None, lambda model: 1.0, widths={"a": 16})


# Runs that diverge


def test_a_run_that_diverges_is_repeated_with_another_seed(tmp_path: Path):
    seeds = []

    def train(model: nn.Module, seed: int) -> None:
        seeds.append(seed)
        if seed == 1:
            raise Diverged("the loss is NaN")

    found = search(train, runs=2, budget=4, folder=tmp_path)
    assert seeds == [0, 1, 1 + searches.REPEATED]  # the repetition was the third training; two more exceed the budget
    assert found.standard.holds
    assert found.standard.runs[1].failures == ("run 1 (seed 1): the loss is NaN",)
    assert found.trainings == 3
    assert found.stopped == "the budget is spent: 3 of 4 trainings"


@pytest.mark.parametrize("how", ["raise", "weights", "score", "overflow"])
def test_a_run_that_diverges_twice_is_given_up_with_the_history_kept(tmp_path: Path, how: str):
    trained = []

    def train(model: nn.Module, seed: int) -> None:
        trained.append(seed)
        if width(model, 1) == 16 or seed % searches.REPEATED != 1:
            return
        if how == "raise":
            raise Diverged("the loss is NaN")
        if how == "overflow":
            raise OverflowError("too large")
        if how == "weights":
            model[2].weight.data[0] = math.nan  # type: ignore[index]
        model[2].bias.data[0] = 77  # type: ignore[index]

    def evaluate(model: nn.Module) -> float:
        return math.nan if how == "score" and model[2].bias[0].item() == 77 else 1.0  # type: ignore[index]

    found = search(train, evaluate, runs=2, budget=5, folder=tmp_path)
    assert [step.holds for step in found.steps] == [True, False]
    why = found.steps[1].given_up["1"]
    assert why.startswith("run 1 (seed 1): ")
    assert f"run 1 (seed {1 + searches.REPEATED}): " in why
    assert len(found.steps[1].runs) == 1
    assert f"step 1, run 1 was given up: {why}." in found.notes
    assert found.trainings == len(trained) == 5
    assert WidthSearch.load(tmp_path / "search.json").to_json() == found.to_json()
    more = search(train, evaluate, runs=2, budget=7, folder=tmp_path)  # and not tried a third time
    assert more.steps[1].given_up == found.steps[1].given_up
    assert trained[5:] == [0, 1, 1 + searches.REPEATED]  # of the third step
    assert [step.holds for step in more.steps] == [True, False, False]


def test_a_standard_network_that_diverges_ends_the_search(tmp_path: Path):
    def train(model: nn.Module) -> None:
        raise Diverged("the loss is NaN")

    found = search(train, runs=2, budget=9, folder=tmp_path)
    assert len(found.steps) == 1
    assert found.stopped.startswith("the standard network could not be trained: run 0 (seed 0): the loss is NaN; run 0")
    assert found.widths == START
    assert "0  " in str(found)
    assert WidthSearch.load(tmp_path / "search.json").to_json() == found.to_json()


def test_other_errors_of_train_are_the_callers():
    def train(model: nn.Module) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        search(train)


# Folders


def plain(found: WidthSearch) -> str:
    """Return all of a result but the seconds, which no two runs share."""
    return re.sub(r'"seconds": [0-9.e-]+', '"seconds": 0', json.dumps(found.to_json()))


def test_a_stopped_search_goes_on_and_takes_a_larger_budget(tmp_path: Path):
    trained = []
    found = search(trained.append, runs=2, budget=4, folder=tmp_path)
    files = sorted(str(one.relative_to(tmp_path)) for one in tmp_path.rglob("*") if one.is_file())
    runs = [f"step_{step}/run_{run}{end}" for step in (0, 1) for run in (0, 1) for end in (".json", "_0.safetensors")]
    assert set(runs) <= set(files)
    (tmp_path / "step_1" / "run_1.json").unlink()
    again = search(trained.append, runs=2, budget=4, folder=tmp_path)
    assert len(trained) == 5
    assert plain(again) == plain(found)
    more = search(trained.append, runs=2, budget=6, folder=tmp_path)
    assert len(trained) == 7
    assert path(more)[:2] == path(found)
    saved = pp.WidthSearch.load(tmp_path / "search.json")
    assert saved.to_json() == more.to_json()
    with pytest.raises(ValueError, match=r"optimize_widths: .* holds a run with other tolerance\."):
        search(runs=2, budget=4, folder=tmp_path, tolerance=0.5)
    fresh = search(trained.append, runs=1, budget=1, folder=tmp_path, fresh=True)
    assert len(fresh.steps) == 1
    assert not (tmp_path / "step_1" / "run_0.json").exists()


def test_a_folder_with_another_search_is_refused(tmp_path: Path):
    search(folder=tmp_path, budget=2)
    content = json.loads((tmp_path / "step_1" / "run_0.json").read_text())
    content["widths"]["a"] = 9
    (tmp_path / "step_1" / "run_0.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"run_0\.json is of other widths, \{'a': 9, 'b': 8\}"):
        search(folder=tmp_path, budget=2)
    (tmp_path / "step_1" / "run_0.json").write_text("{}")
    with pytest.raises(ValueError, match=r"WidthRun\.load"):
        search(folder=tmp_path, budget=2)
    (tmp_path / "step_1" / "run_0.json").unlink()
    for odd in ('{"failures": 3}', '{"failures": [3]}', "{}"):
        text = '{"format": "pyprune.width_failures", "version": 1, ' + odd[1:]
        (tmp_path / "step_1" / "run_0.failed.json").write_text(text.replace(", }", "}"))
        with pytest.raises(ValueError, match=r"optimize_widths: .*failed\.json lacks or garbles 'failures'"):
            search(folder=tmp_path, budget=2)


def test_networks_are_built_at_multiples_alone():
    def in_eights(widths: Mapping[str, int]) -> nn.Module:
        assert all(width % 8 == 0 for width in widths.values())
        return build(widths)

    for start in (8, 16, 24):
        found = pp.optimize_widths(
            in_eights, lambda model: None, lambda model: 1.0, widths={"a": start, "b": 16}, round_to=8, runs=1, budget=4
        )
        assert found.widths == {"a": 8, "b": 8}


# Being killed

SEARCH = """
import functools, os, signal, sys
from torch.utils.data import Subset
import pyprune as pp
from pyprune import files
from pyprune.data import digits, loader

folder, fatal = sys.argv[1], int(sys.argv[2])
written, write = 0, files.write_bytes


def counted(path, data):
    global written
    write(path, data)
    written += 1
    if written == fatal:
        os.kill(os.getpid(), signal.SIGKILL)


files.write_bytes = counted
splits = digits(seed=0)
train, val = Subset(splits.train, range(256)), Subset(splits.val, range(64))
found = pp.optimize_widths(
    lambda widths: pp.models.vgg_digits(widths=widths),
    functools.partial(pp.finetune, train=loader(train, shuffle=True), epochs=2, lr=0.05),
    lambda model: pp.evaluate(model, loader(val)),
    widths={"block1": 6, "block2": 8}, runs=1, budget=2, folder=folder, smallest=2, tolerance=0.5,
)
"""


def killed(folder: Path, fatal: int) -> bool:
    """Search in a child that SIGKILL ends right after its n-th write; return whether it did."""
    words = [sys.executable, "-c", SEARCH, str(folder), str(fatal)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


def left(folder: Path) -> tuple[str, dict[str, str]]:
    """Return the result of a search and the fingerprints of all weights that it left."""
    weights = {
        str(one.relative_to(folder)): fingerprint(read_tensors("test", one)[0]) for one in folder.rglob("*.safetensors")
    }
    return plain(WidthSearch.load(folder / "search.json")), weights


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    """What a search leaves that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert not killed(folder, 0)
    return left(folder)


def test_a_search_killed_in_the_middle_ends_with_the_same_bits(tmp_path: Path, whole: tuple[str, dict[str, str]]):
    assert killed(tmp_path, 8)  # in the second training: its first epoch has been kept
    assert (tmp_path / "step_1" / "run_0_0.training.safetensors").exists()
    assert not killed(tmp_path, 0)
    assert left(tmp_path) == whole
    assert set(whole[1]) == {"narrow.safetensors", "step_0/run_0_0.safetensors", "step_1/run_0_0.safetensors"}


@pytest.mark.slow
def test_a_search_killed_after_every_single_write_ends_with_the_same_bits(
    tmp_path: Path, whole: tuple[str, dict[str, str]]
):
    fatal, kills, before = 2, 0, {}  # the first write of every process says what the folder holds
    while killed(tmp_path, fatal):
        after = {one: one.read_bytes() for one in tmp_path.rglob("*") if one.is_file()}
        fatal = fatal + 1 if after == before else 2  # what is written again as it was is no progress
        before, kills = after, kills + 1
        assert kills < 40
    assert kills > 12
    assert left(tmp_path) == whole
