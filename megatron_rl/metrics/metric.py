"""Typed metrics that reduce over ranks: a name and one of Mean, Sum, Max, Min."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Protocol, Self, cast

import torch
from torch import Tensor

NUM_LARGEST = 3


class Reduction(Protocol):
    """A value that can be merged with another of its kind."""

    def merge(self, other: Self) -> Self: ...

    def result(self) -> float: ...


@dataclass(frozen=True)
class Mean:
    """A weighted mean, kept as sum and weight until the end."""

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
    value: float

    def merge(self, other: "Sum") -> "Sum":
        return Sum(self.value + other.value)

    def result(self) -> float:
        return self.value


@dataclass(frozen=True)
class Max:
    value: float

    def merge(self, other: "Max") -> "Max":
        return Max(max(self.value, other.value))

    def result(self) -> float:
        return self.value


@dataclass(frozen=True)
class Largest:
    """A maximum that says where it and the next smaller values are."""

    found: tuple[tuple[float, str], ...]
    """Values and their places, the largest first and NaN before all; NUM_LARGEST at most, 1 at least."""

    def merge(self, other: "Largest") -> "Largest":
        both = {*self.found, *other.found}  # another pass over the same samples finds the same once more
        return Largest(tuple(sorted(both, key=_size, reverse=True)[:NUM_LARGEST]))

    def result(self) -> float:
        return self.found[0][0]


@dataclass(frozen=True)
class Min:
    value: float

    def merge(self, other: "Min") -> "Min":
        return Min(min(self.value, other.value))

    def result(self) -> float:
        return self.value


def _size(one: tuple[float, str]) -> tuple[float, str]:
    return math.inf if math.isnan(one[0]) else one[0], one[1]


Metrics = Mapping[str, Reduction]
_KINDS = {kind.__name__: kind for kind in (Mean, EffectiveShare, ExplainedVariance, Sum, Max, Largest, Min)}


def to_plain(metrics: Metrics) -> dict[str, list[Any]]:
    """Metrics as JSON can hold them."""
    return {name: [type(value).__name__, *astuple(cast(Any, value))] for name, value in metrics.items()}


def from_plain(plain: Mapping[str, Sequence[Any]]) -> dict[str, Reduction]:
    """What ``to_plain`` was given."""
    return {name: _from_plain(*value) for name, value in plain.items()}


def _from_plain(kind: str, *values: Any) -> Reduction:
    if kind == "Largest":
        values = (tuple((size, place) for size, place in values[0]),)
    made: Reduction = _KINDS[kind](*values)
    return made


def merge(parts: Iterable[Metrics]) -> dict[str, Reduction]:
    """One mapping of several; equal names must be of equal kind."""
    merged: dict[str, Reduction] = {}
    for part in parts:
        for name, value in part.items():
            if name in merged and type(merged[name]) is not type(value):
                raise AssertionError(f"metric {name} is both {type(merged[name]).__name__} and {type(value).__name__}")
            merged[name] = merged[name].merge(value) if name in merged else value
    return merged


def results(metrics: Metrics) -> dict[str, float]:
    """Plain numbers."""
    return {name: value.result() for name, value in metrics.items()}


def mean_of(values: Sequence[float] | Tensor) -> Mean:
    """The mean of some values, each of weight 1."""
    numbers = torch.as_tensor(values, dtype=torch.float64)
    return Mean(float(numbers.sum()), numbers.numel())


def mean_max_min(name: str, values: Sequence[float] | Tensor) -> dict[str, Reduction]:
    """``name/mean``, ``name/max`` and ``name/min``; nothing for no values."""
    numbers = torch.as_tensor(values, dtype=torch.float64)
    if not numbers.numel():
        return {}
    return {
        f"{name}/mean": mean_of(numbers),
        f"{name}/max": Max(float(numbers.max())),
        f"{name}/min": Min(float(numbers.min())),
    }


def explained_variance(predictions: Tensor, targets: Tensor) -> ExplainedVariance:
    """Of some targets, [K] each."""
    error, target = (targets - predictions).double(), targets.double()
    return ExplainedVariance(
        targets.numel(),
        *(float(values.sum()) for values in (error, error.square(), target, target.square())),
    )
