"""The hierarchical bootstrap: exact where a case can be constructed, against the standard error elsewhere."""

import math

import numpy as np
import pytest

from antidreambooth.evaluation.statistics import bootstrap, paired


def sample(people: int, cells: int, images: int, spread: tuple[float, float, float] = (1, 0.5, 1), seed: int = 0):
    """Normal values with a standard deviation between people, between cells and between pictures."""
    rng = np.random.default_rng(seed)
    return {
        f"p{number:02d}": [own + rng.normal(0, spread[1]) + rng.normal(0, spread[2], images) for _ in range(cells)]
        for number, own in enumerate(rng.normal(0, spread[0], people))
    }


@pytest.mark.parametrize(("people", "cells", "images"), [(1, 1, 8), (1, 3, 8), (4, 1, 8), (5, 2, 6), (12, 3, 1)])
def test_interval_holds_the_mean_and_counts(people, cells, images):
    values = sample(people, cells, images)
    interval = bootstrap(values)
    assert interval.low <= interval.mean <= interval.high
    assert interval.mean == pytest.approx(np.mean([np.concatenate(own).mean() for own in values.values()]))
    assert (interval.people, interval.cells, interval.images) == (people, people * cells, people * cells * images)


def test_a_constant_has_no_width():
    interval = bootstrap({"a": [np.full(5, 0.25), np.full(3, 0.25)], "b": [np.full(4, 0.25)]})
    assert (interval.low, interval.mean, interval.high) == (0.25, 0.25, 0.25)


def test_the_same_seed_gives_the_same_interval_in_any_order():
    values = sample(4, 2, 5)
    assert bootstrap(values) == bootstrap(dict(reversed(values.items())))
    assert bootstrap(values, seed=1) != bootstrap(values)


def test_more_people_give_a_narrower_interval():
    widths = [(i := bootstrap(sample(people, 2, 8))).high - i.low for people in (5, 20, 80)]
    assert widths[0] > widths[1] > widths[2]


def test_people_count_the_same_whatever_they_have():
    interval = bootstrap({"few": [np.array([1.0])], "many": [np.zeros(50), np.zeros(50)]})
    assert interval.mean == 0.5


def test_undefined_values_are_left_out():
    values = {"a": [np.array([0.5, np.nan, 0.7]), np.array([np.nan, np.nan])], "b": [np.array([np.nan])]}
    interval = bootstrap(values)
    assert interval.mean == pytest.approx(0.6)
    assert (interval.people, interval.cells, interval.images) == (1, 1, 2)
    nothing = bootstrap({"a": [np.array([np.nan])]})
    assert math.isnan(nothing.mean)
    assert not nothing.defined
    assert not nothing.below_zero


@pytest.mark.parametrize(
    ("people", "cells", "over"),
    [
        (3, 2, "people, seeds and images"),
        (3, 1, "people and images"),
        (1, 2, "seeds and images only"),
        (1, 1, "images only"),
    ],
)
def test_it_says_what_the_interval_is_over(people, cells, over):
    assert bootstrap(sample(people, cells, 4)).over == over


def test_one_level_agrees_with_the_standard_error():
    values = np.random.default_rng(3).gamma(2, 1, 60)
    interval = bootstrap({"a": [values]}, resamples=8000)
    error = values.std() / math.sqrt(len(values))
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.06)
    assert interval.low == pytest.approx(interval.mean - 1.96 * error, abs=0.3 * error)
    assert interval.high > 2 * interval.mean - interval.low  # the values are skewed to the right, and so is their mean


def test_variance_adds_up_over_the_levels():
    """With p people, c cells and m pictures drawn with replacement, each level adds its plug-in variance."""
    values = sample(6, 4, 5)
    table = np.array([np.stack(own) for own in values.values()])
    people = table.mean(axis=(1, 2)).var() / 6
    cells = table.mean(axis=2).var(axis=1).mean() / (6 * 4)
    images = table.var(axis=2).mean() / (6 * 4 * 5)
    interval = bootstrap(values, resamples=20000)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * math.sqrt(people + cells + images), rel=0.04)


def test_a_paired_difference_is_exact():
    control = {"a": [np.array([0.0, 0.0]), np.array([1.0, 1.0])], "b": [np.array([5.0, 5.0])]}
    method = {person: [cell - 2 for cell in cells] for person, cells in control.items()}
    difference = paired(method, control)
    assert (difference.low, difference.mean, difference.high) == (-2, -2, -2)  # what the pairs share cancels out
    assert difference.below_zero


def test_pairs_are_worth_more_than_their_two_means():
    control = sample(8, 3, 10, spread=(5, 2, 0.1))
    method = {person: [cell - 0.5 for cell in cells] for person, cells in control.items()}
    assert paired(method, control).below_zero
    assert bootstrap(method).high > bootstrap(control).low


def test_a_difference_needs_pairs():
    with pytest.raises(ValueError, match="pair them first"):
        paired(sample(2, 2, 3), sample(2, 1, 3))
    with pytest.raises(ValueError, match="nothing to average"):
        bootstrap({})


def test_ninety_five_percent_hold_the_truth():
    """Ten people, so a little under: the module says why."""
    found = [bootstrap(sample(10, 2, 6, seed=seed), resamples=400) for seed in range(200)]
    assert 0.88 <= np.mean([interval.low <= 0 <= interval.high for interval in found]) <= 0.98
