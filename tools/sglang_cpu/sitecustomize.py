"""Read by every interpreter of the SGLang environment for CPUs: lets torchvision be imported beside the CPU torch.

The wheel there is has CUDA operators; it refers to their schemas when it is imported, and nothing calls them.
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
    """Defines the operators' schemas just before torchvision is imported."""

    def __init__(self) -> None:
        self._library: Any = None

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        """Never finds anything; called for every import."""
        if fullname != "torchvision" or self._library is not None:
            return
        import torch

        self._library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in (*SCHEMAS, *(f"{name}(Tensor x) -> Tensor" for name in OTHERS)):
            self._library.define(schema)


sys.meta_path.insert(0, SchemasFirst())
