"""Parallel layouts in a shorthand, "tp2 pp2 sp"."""

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

import pytest

from tests.covering import chosen, covering

SIZES = {
    "tp": "tensor_parallel",
    "pp": "pipeline_parallel",
    "vpp": "virtual_pipeline_parallel",
    "cp": "context_parallel",
    "ep": "expert_parallel",
    "etp": "expert_tensor_parallel",
}
OVERLAP = "parallel.overlap_grad_reduce=true parallel.overlap_param_gather=true"
FIRST_3 = "parallel.num_layers_in_first_pipeline_stage=3 parallel.num_layers_in_last_pipeline_stage=1"
PADDED = "batching.packed=false"


def keys(text: str) -> list[str]:
    """Return the overrides of a layout.

    Args:
        text: sizes of kinds of parallelism (tp, pp, vpp, cp, ep, etp), "sp" for sequence parallelism, "dp2" for
            replicas, which need no override, and overrides.
    """
    overrides = []
    for word in text.split():
        if "." in word:
            overrides.append(word)
        elif word == "sp":
            overrides.append("parallel.sequence_parallel=true")
        elif not word.startswith("dp"):
            kind, size = word.rstrip("0123456789"), word.lstrip("abcdefghijklmnopqrstuvwxyz")
            overrides.append(f"parallel.{SIZES[kind]}_size={size}")
    return overrides


def num_ranks(text: str) -> int:
    """Return the number of ranks of a layout in which every kind of parallelism is given, replicas included."""
    words = (word for word in text.split() if word[:2] in ("tp", "pp", "cp", "dp"))
    return prod(int(word[2:]) for word in words)


def layouts(*options: Sequence[str], max_ranks: int = 4, strength: int = 2) -> list[tuple[int, str]]:
    """Return a covering array of layouts, as pairs of a number of ranks and a layout.

    Args:
        options: texts of which a layout has one each; the first one is the default.
        strength: number of options of which all values occur together.
    """

    def is_valid(chosen: Mapping[str, str]) -> bool:
        words = " ".join(chosen.values()).split()
        size = {word[:-1]: int(word[-1]) for word in words if word[:-1] in SIZES}
        expert_ranks = size.get("ep", 1) * size.get("etp", size.get("tp", 1))
        size_of_all = num_ranks(" ".join(words))
        return size_of_all <= max_ranks and size_of_all // size.get("pp", 1) % expert_ranks == 0

    rows = covering({str(index): values for index, values in enumerate(options)}, is_valid, strength=strength)
    texts = (" ".join(filter(None, row.values())) for row in rows)
    return [(num_ranks(text), text) for text in texts]


def layout_cases(
    *options: Sequence[str], also: Iterable[tuple[int, str]] = (), beyond: Iterable[tuple[int, str]] = ()
) -> Any:
    """Parametrize a test by ``world_size`` and ``layout``.

    Args:
        options: as for ``layouts``; all pairs are tested, all triples are exhaustive, and the defaults left out.
        also: further cases.
        beyond: further exhaustive cases.
    """
    few = [case for case in [*layouts(*options), *also] if case != (1, "")]
    every = dict.fromkeys([*few, *layouts(*options, strength=3), *beyond])
    return pytest.mark.parametrize(("world_size", "layout"), chosen(every, few))
