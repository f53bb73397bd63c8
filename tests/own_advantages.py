"""Advantage estimators for tests."""

import os
import time
from typing import Any

from torch import Tensor


def hangs_on_the_second_rank(rewards: Tensor, *others: Any, **settings: Any) -> Tensor:
    """Group mean as baseline, except that rank 1 never returns."""
    if os.environ.get("RANK") == "1":
        time.sleep(10**6)
    return rewards - rewards.mean()
