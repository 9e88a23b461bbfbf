"""For the processes that tests with --no-onednn-packing start: the operator fails before anything has tried it."""

import sys
from importlib.abc import MetaPathFinder


class _Patching(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if (
            fullname == "qwen2vl_trt.runtime.backends.onednn"
        ):  # which alone uses it; importing torch now would slow every process
            sys.meta_path.remove(self)
            import torch

            from tests.support.onednn_packing import TYPES, PackingWithout

            torch.ops.mkldnn._reorder_linear_weight = PackingWithout(*TYPES)


sys.meta_path.insert(0, _Patching())
