"""Advantages of the tests."""

import os
import time
from typing import Any

from torch import Tensor


def hangs_on_the_second_rank(rewards: Tensor, *others: Any, **settings: Any) -> Tensor:
    """Never comes back there."""
    if os.environ.get("RANK") == "1":
        time.sleep(10**6)
    return rewards - rewards.mean()
