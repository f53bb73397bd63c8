"""Typed metrics that can be reduced over ranks."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Protocol, Self, cast

import torch
from torch import Tensor

NUM_LARGEST = 3
"""Entries that a ``Largest`` keeps."""


class Reduction(Protocol):
    """A value that can be merged with another of its kind."""

    def merge(self, other: Self) -> Self: ...

    def result(self) -> float: ...


@dataclass(frozen=True)
class Mean:
    """A weighted mean, kept as weighted sum and weight until it is reduced."""

    total: float
    weight: float = 1.0

    def merge(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.weight + other.weight)

    def result(self) -> float:
        return self.total / self.weight if self.weight else float("nan")


@dataclass(frozen=True)
class EffectiveShare:
    """Effective sample size of importance weights, as a share of their number: (sum w)^2 / (n sum w^2)."""

    total: float
    total_of_squares: float
    count: float

    def merge(self, other: "EffectiveShare") -> "EffectiveShare":
        return EffectiveShare(
            self.total + other.total, self.total_of_squares + other.total_of_squares, self.count + other.count
        )

    def result(self) -> float:
        return self.total**2 / (self.count * self.total_of_squares) if self.total_of_squares else float("nan")


@dataclass(frozen=True)
class ExplainedVariance:
    """Share of a target's variance that a prediction explains: 1 - var(target - prediction) / var(target)."""

    count: float
    error: float
    """Sum of target - prediction."""
    squared_error: float
    target: float
    squared_target: float

    def merge(self, other: "ExplainedVariance") -> "ExplainedVariance":
        return ExplainedVariance(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def result(self) -> float:
        if not self.count:
            return math.nan
        left = self.squared_error / self.count - (self.error / self.count) ** 2
        whole = self.squared_target / self.count - (self.target / self.count) ** 2
        return 1 - left / whole if whole > 0 else math.nan


@dataclass(frozen=True)
class Sum:
    """A sum."""

    value: float

    def merge(self, other: "Sum") -> "Sum":
        return Sum(self.value + other.value)

    def result(self) -> float:
        return self.value


@dataclass(frozen=True)
class Max:
    """A maximum."""

    value: float

    def merge(self, other: "Max") -> "Max":
        return Max(max(self.value, other.value))

    def result(self) -> float:
        return self.value


@dataclass(frozen=True)
class Largest:
    """A maximum with labels of the largest values, for example the positions of tokens."""

    entries: tuple[tuple[float, str], ...]
    """1 to NUM_LARGEST pairs of value and label, the largest value first and NaN before all others."""

    def merge(self, other: "Largest") -> "Largest":
        merged = {*self.entries, *other.entries}  # a set: another pass over the same samples yields equal entries
        return Largest(tuple(sorted(merged, key=_sort_key, reverse=True)[:NUM_LARGEST]))

    def result(self) -> float:
        return self.entries[0][0]


@dataclass(frozen=True)
class Min:
    """A minimum."""

    value: float

    def merge(self, other: "Min") -> "Min":
        return Min(min(self.value, other.value))

    def result(self) -> float:
        return self.value


def _sort_key(entry: tuple[float, str]) -> tuple[float, str]:
    return math.inf if math.isnan(entry[0]) else entry[0], entry[1]


Metrics = Mapping[str, Reduction]
_KINDS = {kind.__name__: kind for kind in (Mean, EffectiveShare, ExplainedVariance, Sum, Max, Largest, Min)}


def to_plain(metrics: Metrics) -> dict[str, list[Any]]:
    """Convert metrics to values that JSON can represent."""
    return {name: [type(value).__name__, *astuple(cast(Any, value))] for name, value in metrics.items()}


def from_plain(plain: Mapping[str, Sequence[Any]]) -> dict[str, Reduction]:
    """Convert the result of ``to_plain`` back to metrics."""
    return {name: _from_plain(*value) for name, value in plain.items()}


def _from_plain(kind: str, *values: Any) -> Reduction:
    if kind == "Largest":
        values = (tuple((size, label) for size, label in values[0]),)
    metric: Reduction = _KINDS[kind](*values)
    return metric


def merge(parts: Iterable[Metrics]) -> dict[str, Reduction]:
    """Merge several mappings into one; metrics of the same name must be of the same kind."""
    merged: dict[str, Reduction] = {}
    for part in parts:
        for name, value in part.items():
            if name in merged and type(merged[name]) is not type(value):
                raise AssertionError(f"metric {name} is both {type(merged[name]).__name__} and {type(value).__name__}")
            merged[name] = merged[name].merge(value) if name in merged else value
    return merged


def results(metrics: Metrics) -> dict[str, float]:
    """The final number of each metric."""
    return {name: value.result() for name, value in metrics.items()}


def mean_of(values: Sequence[float] | Tensor) -> Mean:
    """The mean of the values, each with weight 1."""
    numbers = torch.as_tensor(values, dtype=torch.float64)
    return Mean(float(numbers.sum()), numbers.numel())


def mean_max_min(name: str, values: Sequence[float] | Tensor) -> dict[str, Reduction]:
    """``name/mean``, ``name/max`` and ``name/min``; empty if there are no values."""
    numbers = torch.as_tensor(values, dtype=torch.float64)
    if not numbers.numel():
        return {}
    return {
        f"{name}/mean": mean_of(numbers),
        f"{name}/max": Max(float(numbers.max())),
        f"{name}/min": Min(float(numbers.min())),
    }


def explained_variance(predictions: Tensor, targets: Tensor) -> ExplainedVariance:
    """Share of the variance of ``targets`` [K] that ``predictions`` [K] explain."""
    error, target = (targets - predictions).double(), targets.double()
    return ExplainedVariance(
        targets.numel(),
        *(float(values.sum()) for values in (error, error.square(), target, target.square())),
    )
