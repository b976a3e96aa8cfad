"""A pretended GPU: tensors that report `cuda` and hold CPU data. It shows, without a GPU, where a script waits for it.

Inside `PretendCuda`, `device="cuda"` works. Mixing devices and `.numpy()` raise, as on a GPU. `waits` counts, by file
and line of the scripts, what makes the CPU wait for a GPU: reading a value, an index that is boolean or on the CPU, a
blocking copy. The CPU computes, so results equal the CPU's.
"""

import collections
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).parents[2]
READING = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__format__", "equal", "nonzero",
           "masked_select", "unique", "bincount"}  # fmt: skip


class CudaTensor(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    is_cuda = True


class PretendCuda(TorchFunctionMode):
    def __enter__(self):
        self.waits = collections.Counter()
        self.patch = pytest.MonkeyPatch()
        join = dist.init_process_group
        for owner, name, replacement in (
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "device_count", lambda: 8),
            (torch.cuda, "set_device", lambda device: None),
            (torch.Tensor, "pin_memory", lambda tensor: tensor),
            (dist, "init_process_group", lambda backend, device_id, **options: join("gloo", **options)),
        ):
            self.patch.setattr(owner, name, replacement)
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # module.to() replaces Parameters
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        self.patch.undo()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        cuda = any(isinstance(x, CudaTensor) for x in tensors)  # where the result is
        mixed = cuda and not all(isinstance(x, CudaTensor) for x in tensors if x.dim())
        waits = cuda and name in READING
        if name in ("to", "cpu", "cuda"):
            x, words = args[0], args[1:] if name == "to" else (name, *args[1:])
            device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*words, **kwargs)
            moves = device is not None and (device.type == "cuda") != cuda
            waits, cuda, mixed = moves and not non_blocking, cuda != moves, False
            x = x.as_subclass(torch.Tensor) if moves else x
            func, args, kwargs = torch.Tensor.to, (x, dtype or x.dtype), {"copy": moves, "memory_format": memory_format}
            kwargs = {key: value for key, value in kwargs.items() if value is not None}
        elif kwargs.get("device") is not None:
            target = torch.device(kwargs["device"]).type
            waits = target == "cuda" and not cuda and name in ("tensor", "as_tensor")
            cuda, kwargs["device"] = target == "cuda", "meta" if target == "meta" else "cpu"
        elif name == "new_tensor":
            waits = cuda
        elif name in ("__getitem__", "__setitem__") and cuda:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            waits = mixed or any(isinstance(x, list) or getattr(x, "dtype", None) == torch.bool for x in index)
            mixed = False
        elif name == "copy_":
            waits, mixed = mixed and not kwargs.get("non_blocking", len(args) > 2 and args[2]), False
        elif name == "_has_compatible_shallow_copy_type":  # asked by module.to()
            mixed = False
        elif name == "__deepcopy__":
            func, args = torch.clone, (args[0].detach(),)
        elif name == "__reduce_ex__":  # files hold plain tensors
            args, cuda = (args[0].as_subclass(torch.Tensor), *args[1:]), False
        if mixed or (cuda and name == "numpy"):
            raise RuntimeError(f"{name} of tensors on the pretended GPU and on the CPU")
        if waits:
            self.count(name)
        result = func(*args, **kwargs)
        if not cuda:
            return result
        return tree_map(lambda x: x.as_subclass(CudaTensor) if type(x) is torch.Tensor else x, result)

    def count(self, name):
        frame = sys._getframe(2)
        while frame.f_back and Path(frame.f_code.co_filename).parent != ROOT:
            frame = frame.f_back
        self.waits[f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {name}"] += 1
