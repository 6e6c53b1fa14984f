"""Means with an interval over people, seeds and pictures: the hierarchical bootstrap.

Davison and Hinkley, Bootstrap Methods and their Application (1997), sections 3.8 and 5.3. One resample draws as many
people as there are, with replacement; for each drawn person as many of their cells (a cell is one trained victim, so
one seed); for each drawn cell as many of its pictures. The interval is the 2.5th to the 97.5th percentile of the mean.

What it assumes, and where it is wrong:

- People are drawn independently from the population that is spoken about, the cells of a person share nothing but the
  person, and the pictures of a cell are exchangeable (several prompts are mixed).
- Every person counts the same; within a person every picture with a value counts the same.
- With few people, percentiles of resampled means are too narrow: by a factor sqrt((n - 1) / n), and as normal instead
  of t quantiles. Resampling seeds and pictures below people works against it, as the spread between people holds theirs
  already. Below about five people read the interval as a sketch.
- With one person it says nothing about other people, with one cell for each nothing about other seeds: see ``over``.
- Pictures that all agree give an interval of no width. Of n pictures without an event, up to about 3/n may still be
  the true share (the rule of three).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Values = NDArray[
    np.float64
]  # one for each picture of a cell; NaN where undefined, as the ISM of a picture without face
Sample = Mapping[str, Sequence[Values]]  # person -> cells

RESAMPLES = 2000
_TAILS = (0.025, 0.975)


@dataclass(frozen=True)
class Interval:
    """A mean, its 95 % interval, and of how many people, cells and defined values; NaN where nothing is defined."""

    mean: float
    low: float
    high: float
    people: int
    cells: int
    images: int

    @property
    def defined(self) -> bool:
        """Whether there is a mean at all."""
        return self.images > 0

    @property
    def below_zero(self) -> bool:
        """Whether the interval lies entirely below 0: of a difference, that a fall is shown."""
        return self.high < 0

    @property
    def over(self) -> str:
        """What the interval speaks about."""
        seeds = self.cells > self.people
        if self.people > 1:
            return "people, seeds and images" if seeds else "people and images"
        return "seeds and images only" if seeds else "images only"


def bootstrap(sample: Sample, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Mean over people of the mean over their pictures; see the module for the interval."""
    cells = [list(sample[person]) for person in sorted(sample)]
    plan = _plan(tuple(map(len, cells)), resamples, seed)
    return _interval(_observed(cells), _resampled(cells, plan[0], seed), cells)


def paired(method: Sample, control: Sample, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Mean over people of method minus control, where cell i of a person is paired with cell i of the control.

    A resample draws pairs, so what both share (the person, the victim's seed) cancels out, and pictures of each on
    their own. Cells and images are counted on the method's side.

    Raises:
        ValueError: The two do not hold the same people with the same number of cells.
    """
    if {person: len(cells) for person, cells in method.items()} != {
        name: len(cells) for name, cells in control.items()
    }:
        raise ValueError("method and control need the same people with the same number of cells: pair them first")
    ours, theirs = ([list(sample[person]) for person in sorted(method)] for sample in (method, control))
    plan = _plan(tuple(map(len, ours)), resamples, seed)
    differences = _resampled(ours, plan[0], seed) - _resampled(theirs, plan[1], seed)
    return _interval(_observed(ours) - _observed(theirs), differences, ours)


@lru_cache(maxsize=64)
def _plan(cells: tuple[int, ...], resamples: int, seed: int) -> NDArray[np.int64]:
    """What is drawn: sides (method, control) x resamples x people x cells, as positions in ``_bank``.

    Pictures are resampled once for each cell, as many times as there are resamples; a drawn cell takes one of these at
    random, so that a cell drawn twice brings different pictures. Both sides draw the same cells, each its own pictures.
    """
    if not cells or not all(cells):
        raise ValueError("there is nothing to average: every person needs a cell")
    generator = np.random.default_rng((seed, 0))
    people, most = len(cells), max(cells)
    who = generator.integers(people, size=(resamples, people))
    own = np.array(cells)[who][..., None]
    first = (np.cumsum(cells) - cells)[who][..., None]
    which = first + (generator.random((resamples, people, most)) * own).astype(np.int64)
    drawn = which * resamples + generator.integers(resamples, size=(2, resamples, people, most))
    return np.where(np.arange(most) < own, drawn, sum(cells) * resamples)  # people with fewer cells: the empty end


@lru_cache(maxsize=16)
def _multiplicities(images: int, resamples: int, seed: int) -> Values:
    """How often each of ``images`` pictures is drawn, images x resamples."""
    generator = np.random.default_rng((seed, 1, images))
    drawn = generator.multinomial(images, np.full(images, 1 / images), size=resamples)
    return np.ascontiguousarray(drawn.T, dtype=np.float64)


def _resampled(cells: list[list[Values]], drawn: NDArray[np.int64], seed: int) -> Values:
    """Means of the drawn people, resamples x people."""
    total, count = _bank([values for person in cells for values in person], len(drawn), seed)
    return _ratio(total.take(drawn).sum(axis=2), count.take(drawn).sum(axis=2))


def _bank(cells: list[Values], resamples: int, seed: int) -> Values:
    """Sum and count of the defined values in every resample of every cell's pictures; ends with an empty one."""
    banks = [
        np.stack([np.nan_to_num(values), ~np.isnan(values)]) @ _multiplicities(len(values), resamples, seed)
        for values in cells
    ]
    return np.concatenate([*banks, np.zeros((2, 1))], axis=1)


def _observed(cells: list[list[Values]]) -> Values:
    """Mean of each person's defined values."""
    values = [np.concatenate(person) for person in cells]
    return _ratio(np.array([np.nansum(v) for v in values]), np.array([np.count_nonzero(~np.isnan(v)) for v in values]))


def _interval(observed: Values, resampled: Values, cells: list[list[Values]]) -> Interval:
    """Mean of the observed people, percentiles of the resampled ones; people without a value are left out."""
    known = ~np.isnan(observed)
    if not known.any():
        return Interval(np.nan, np.nan, np.nan, 0, 0, 0)
    means = _ratio(np.nansum(resampled, axis=1), np.count_nonzero(~np.isnan(resampled), axis=1))
    low, high = np.nanquantile(means, _TAILS) if not np.isnan(means).all() else (np.nan, np.nan)
    counts = [
        int(np.count_nonzero(~np.isnan(values)))
        for person, kept in zip(cells, known.tolist(), strict=True)
        if kept
        for values in person
    ]
    figures = float(observed[known].mean()), float(low), float(high)
    return Interval(*figures, people=int(known.sum()), cells=sum(count > 0 for count in counts), images=sum(counts))


def _ratio(total: Values, count: NDArray[np.int64] | Values) -> Values:
    """NaN where nothing was counted."""
    ratio: Values = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return ratio
