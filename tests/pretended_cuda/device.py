"""A pretended CUDA device: tensors say cuda:0, are computed on the CPU, refuse to mix with the CPU's, and what a GPU
would have the host wait for is counted in ``WAITS``.

``install()`` puts it in place for the whole process.
"""

import collections
import traceback
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._foreach_utils import _foreach_supported_types
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

WAITS: collections.Counter[tuple[str, str]] = collections.Counter()  # what waited, and where
NEED_VALUES = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "equal",
}
INDEXED = {"index", "index_put_", "_index_put_impl_", "index_put", "_unsafe_index"}
attention = F.scaled_dot_product_attention


def wait(what: str) -> None:
    """Count something that a GPU would have the host wait for, by the line of ours or of torch's that asks for it."""
    frames = [
        f for f in traceback.extract_stack() if "pretended_cuda" not in f.filename and "/torch/" not in f.filename
    ]
    WAITS[what, f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""] += 1


class Pretended(torch.Tensor):
    """A tensor that says cuda:0; ``values`` lie on the CPU."""

    values: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor, requires_grad: bool = False):
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        made = torch.Tensor._make_wrapper_subclass(
            cls, values.size(), **layout, device="cuda:0", requires_grad=requires_grad
        )
        made.values = values
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({self.values})"

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    def tolist(self) -> Any:
        wait("tolist")
        return self.values.tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError("a tensor on the GPU is pickled")

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        copied: torch.Tensor = Pretended(self.values.detach().clone(), requires_grad=self.requires_grad)
        if getattr(self, "_is_param", False):
            copied = torch.nn.Parameter(copied, requires_grad=self.requires_grad)
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


def bare(x: Any) -> Any:
    """What is computed with."""
    return x.values if isinstance(x, Pretended) else x


def dressed(x: Any) -> Any:
    """The same, on the pretended device."""
    return Pretended(x) if isinstance(x, torch.Tensor) and not isinstance(x, Pretended) else x


def is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def copied(source: torch.Tensor, named: dict) -> torch.Tensor:
    """``_to_copy``, the operation behind ``.to``: the only way between the devices."""
    target = named.pop("device", None)
    asynchronous, _ = named.pop("non_blocking", False), named.pop("pin_memory", None)
    here, there = (
        isinstance(source, Pretended),
        is_cuda(target) if target is not None else isinstance(source, Pretended),
    )
    if here and not there:
        wait("copy to the host")
    if there and not here and not (asynchronous and getattr(source, "pinned", False)):
        wait("copy of pageable memory")
    out = torch.ops.aten._to_copy(bare(source), **named)
    return dressed(out) if there else out


def dispatch(func: Any, args: tuple, named: dict) -> Any:
    """One operation: of which device it is, whether it may be, and what it would wait for."""
    name, device = func._schema.name.split("::")[1], named.get("device")
    tensors = [x for x in tree_flatten((args, named))[0] if isinstance(x, torch.Tensor)]
    ours, others = [[x for x in tensors if isinstance(x, Pretended) is kind] for kind in (True, False)]
    if name in ("_to_copy", "to"):
        return copied(args[0], dict(named))
    if name == "copy_":
        host = next((x for x in args[:2] if not isinstance(x, Pretended)), None)
        if others and not (getattr(host, "pinned", False) and (args[2:] or (named.get("non_blocking"),))[0]):
            wait("copy to the host" if isinstance(args[1], Pretended) else "copy of pageable memory")
        bare(args[0]).copy_(bare(args[1]))
        return args[0]
    on_device = is_cuda(device) if device is not None else bool(ours)
    if not ours and not on_device:
        return func(*args, **named)
    if name in INDEXED and others and ours:
        wait("index of the host")
    elif ours and any(x.dim() for x in others):
        raise RuntimeError(f"{name}: mixes cuda:0 with cpu tensors of {[tuple(x.shape) for x in others]}")
    masks = [x for x in (args[1] if name in INDEXED else ()) if isinstance(x, torch.Tensor) and x.dtype == torch.bool]
    if name in NEED_VALUES or masks or (name == "repeat_interleave" and named.get("output_size") is None):
        wait(name)
    pinned = named.get("pin_memory") and not on_device
    if device is not None:
        named = {key: value for key, value in named.items() if key != "pin_memory"} | {"device": "cpu"}
    out = func(*tree_map(bare, args), **tree_map(bare, named))
    if pinned:
        out.pinned = True
    if name == "_local_scalar_dense" or not on_device:
        return out
    return return_and_correct_aliasing(func, args, named, tree_map(dressed, out)) if ours else dressed(out)


class Factories(TorchDispatchMode):
    """Operations that make tensors for the device out of none of its own."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


class Functions(TorchFunctionMode):
    """What must be seen before torch takes it apart: attention, indices by lists, tensors made of the host's values."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is attention and isinstance(args[0], Pretended):
            return torch.ops.aten._scaled_dot_product_attention_math(*args, **kwargs)[0]
        if func in (torch.tensor, torch.as_tensor) and is_cuda(kwargs.get("device")):
            wait("tensor of the host's values")
            return dressed(func(*args, **kwargs | {"device": "cpu"}))
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], Pretended):
            key = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, list) for part in key):
                wait("index that is a list")
            key = tuple(dressed(torch.tensor(part)) if isinstance(part, list) else part for part in key)
            args = (args[0], key, *args[2:])
        return func(*args, **kwargs)


def pin_memory(self: torch.Tensor, device: Any = None) -> Any:
    """A copy that remembers that it is pinned."""
    out: Any = self.clone()
    out.pinned = True
    return out


def install() -> None:
    """From here on there is a GPU of 80 GB."""
    total, cuda = 80 << 30, torch.cuda
    about = {"name": "pretended", "total_memory": total, "major": 9, "minor": 0, "multi_processor_count": 132}
    answers: dict[str, Any] = {
        "is_available": True, "device_count": 8, "current_device": 0, "set_device": None, "is_initialized": True,
        "get_device_name": "pretended", "get_device_capability": (9, 0), "is_bf16_supported": True,
        "get_device_properties": collections.namedtuple("Properties", about)(**about), "mem_get_info": (total, total),
        "memory_allocated": 0, "max_memory_allocated": 0, "reset_peak_memory_stats": None, "empty_cache": None,
        "manual_seed": None, "manual_seed_all": None, "is_current_stream_capturing": False,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(cuda, name, lambda *_, answer=answer, **__: answer)
    cuda.synchronize = lambda *_: wait("synchronize")
    torch.accelerator.is_available = lambda: True
    torch.accelerator.current_accelerator = lambda *_, **__: torch.device("cuda")
    torch.Tensor.pin_memory = pin_memory
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    _foreach_supported_types.append(Pretended)
    for mode in (Factories(), Functions()):
        mode.__enter__()
