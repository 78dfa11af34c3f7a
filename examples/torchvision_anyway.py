"""Import torchvision, also where it was built for another torch and its operators did not load.

    from torchvision_anyway import torchvision

    models = torchvision().models

Importing torchvision registers fake kernels for `nms` and `qnms`. Where its compiled library does not fit the installed torch,
the schemas of the two are all that is missing: datasets and models work without the kernels.
"""

from __future__ import annotations

import importlib
import sys

import torch


def torchvision():
    """The module; ImportError where it is not installed."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:  # "operator torchvision::nms does not exist": only then, as a fitting library defines them itself
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torchvision.library = library  # a library that is collected takes its schemas along
        return importlib.import_module("torchvision")
