"""Make torchvision importable beside the CPU build of torch; Python runs this file at the start of every interpreter.

Only a torchvision wheel with CUDA operators exists. On import it refers to the operators' schemas, which torch must
therefore know; nothing calls the operators.
"""

import importlib.abc
import sys
from typing import Any

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
)
OTHERS = (
    *("qnms", "ps_roi_align", "_ps_roi_align_backward", "_roi_align_backward", "roi_pool", "_roi_pool_backward"),
    *("ps_roi_pool", "_ps_roi_pool_backward", "deform_conv2d", "_deform_conv2d_backward"),
)


class SchemasFirst(importlib.abc.MetaPathFinder):
    """Import hook that defines the operators' schemas just before torchvision is imported."""

    def __init__(self) -> None:
        self._library: Any = None

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        """Define the schemas if torchvision is imported; always None, so that other finders load the module."""
        if fullname != "torchvision" or self._library is not None:
            return
        import torch

        self._library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in (*SCHEMAS, *(f"{name}(Tensor x) -> Tensor" for name in OTHERS)):
            self._library.define(schema)


sys.meta_path.insert(0, SchemasFirst())
