"""On PYTHONPATH in host tests only: lets torchvision's Python half be imported beside a torch for which its native library is not built.

ComfyUI imports torchvision whatever it is used for. A package index gives the CUDA build, which cannot load beside a CPU torch; its
Python half then fails because two operators have no schema. So, just before torchvision is imported, and only if its library does not
load, the two are declared.
"""

import importlib.abc
import importlib.util
import sys


class DeclareOperators(importlib.abc.MetaPathFinder):
    """Finds nothing: it only acts on the first look-up of torchvision, then takes itself away."""

    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torchvision")
        if spec is not None and spec.submodule_search_locations and not library_loads(spec.submodule_search_locations[0]):
            declare()
        return None


def library_loads(folder):
    import os

    import torch

    try:
        for entry in sorted(os.listdir(folder)):
            if entry.startswith("_C.") and entry.endswith((".so", ".pyd")):
                torch.ops.load_library(os.path.join(folder, entry))
                return True
    except (OSError, RuntimeError):
        pass
    return False


def declare():
    import torch

    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    sys.modules[__name__].kept = library  # its schemas live as long as it does


sys.meta_path.insert(0, DeclareOperators())
