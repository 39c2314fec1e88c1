"""Let a CPU build of torch import the CUDA build of torchvision, which vLLM needs for its imports only.

PyPI has only the CUDA build. Its native library does not load with a CPU torch, and its import then fails, because it
registers shapes for two operators of that library. Python imports this module at its start if its folder is on
PYTHONPATH, so that it also works in the processes that vLLM starts.
"""

import sys


class _BeforeTorchvision:
    """Define the two operators just before torchvision is imported."""

    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        import importlib.util

        import torch

        # The CPU build has a library that loads, and defines the operators itself.
        folder = importlib.util.find_spec("torchvision").submodule_search_locations[0]
        try:
            torch.ops.load_library(f"{folder}/_C.so")
        except OSError:
            global operators
            operators = torch.library.Library("torchvision", "DEF")
            operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


sys.meta_path.insert(0, _BeforeTorchvision())
