"""Reading fields of JSON files: what is of another kind is refused by name, never made to fit."""

from dataclasses import dataclass

import numpy as np
import pytest

from pyprune.types import Epoch, reading


@dataclass(frozen=True)
class Row:
    """One field of every kind."""

    count: int
    share: float
    name: str
    done: bool
    more: float | None = None


GOOD = {"count": 3, "share": 1, "name": "a", "done": False}


def test_a_record_has_fields_of_the_declared_kinds():
    assert reading.record(Row, GOOD) == Row(3, 1.0, "a", False)
    assert isinstance(reading.record(Row, GOOD).share, float)
    assert reading.record(Row, {**GOOD, "more": None, "format": "x", "version": 1}).more is None
    assert reading.record(Row, GOOD, name="given").name == "given"
    assert reading.record(Epoch, {"epoch": 1, "lr": 0.1, "train_loss": 2, "val_loss": None, "val_top1": None,
                                  "seconds": 3.5}).val_auc is None  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"),
    [("count", True), ("count", 1.0), ("count", -1), ("count", 1 << 63), ("count", "1"), ("count", None),
     ("share", "0.5"), ("share", True), ("share", None), ("name", 3), ("done", 0), ("done", None), ("more", "x"),
     ("unknown", 1)],
)  # fmt: skip
def test_what_is_of_another_kind_is_named(field, value):
    with pytest.raises(TypeError, match=f"'{field}'"):
        reading.record(Row, {**GOOD, field: value})


def test_what_is_missing_is_named():
    with pytest.raises(KeyError, match="name"):
        reading.record(Row, {key: value for key, value in GOOD.items() if key != "name"})
    with pytest.raises(TypeError, match="Row"):
        reading.record(Row, [1])


def test_arrays_keep_their_numbers():
    assert reading.wholes({"a": [[1, 2], [3, 4]]}, "a").tolist() == [[1, 2], [3, 4]]
    assert reading.wholes({"a": []}, "a").dtype == np.int64
    assert np.isnan(reading.numbers({"a": [1, None]}, "a")).tolist() == [False, True]
    for wrong in ([[1], [2, 3]], [1.5], [True], ["1"], [1 << 70], 3, [[[1]]], [[1], 2]):
        with pytest.raises(TypeError, match="'a'"):
            reading.wholes({"a": wrong}, "a")
