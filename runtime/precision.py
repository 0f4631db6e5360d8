"""The arithmetic that models run in: number formats, autocast, compiled blocks, recomputed activations."""

import argparse
import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode

from models import DiT
from runtime.cli import OptionGroup

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Module = TypeVar("Module", bound=nn.Module)
TRAINED = ("fp32", "tf32", "bf16")  # formats of matrix products; TF32 is fp32 with 10 bits of mantissa, on GPUs only
COMPUTED = (*TRAINED, "fp16")  # and of those that no gradient goes through
STORED = ("fp16", "fp32")  # formats of latents on disk


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The context in which a model runs: products in bf16 or fp16, or as they are; on GPUs also TF32 or all of fp32.

    TF32 stays as it is said here when the context ends: a backward pass comes after it.
    """
    if device.type == "cuda":
        _allow_tf32(precision != "fp32")
    return nullcontext() if DTYPES[precision] == torch.float32 else torch.autocast(device.type, DTYPES[precision])


def _allow_tf32(*allowed: bool) -> None:
    """For matrix products and for cuDNN's convolutions, alike or each."""
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed[0], allowed[-1]


@contextmanager
def own_products(precision: str, device: torch.device) -> Iterator[None]:
    """A context in which products are as ``precision`` says, whatever is said outside; afterwards it holds again.

    For weights that are in that format already: nothing is cast. (The meta device has no autocast that could be off.)
    """
    uncast = (
        torch.autocast(device.type, enabled=False) if torch.amp.is_autocast_available(device.type) else nullcontext()
    )
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        _allow_tf32(precision != "fp32")
        with uncast:
            yield
    finally:
        _allow_tf32(*before)


def add_precision_option(group: OptionGroup, option: str = "--precision", of: str = "matrix products") -> None:
    """The ``--precision`` option of a script, or one like it."""
    group.add_argument(option, choices=COMPUTED, default="fp32", help=f"Use this number format for {of}.")


COMPILE_HELP = "Compile the model's blocks: minutes at the start, faster from then on."


def add_compile_option(group: OptionGroup) -> None:
    """The ``--compile`` option, the same in every script."""
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help=COMPILE_HELP)


def compile_each(modules: Iterable[nn.Module]) -> None:
    """Compile modules of one kind, such as a model's blocks, in place; names in its state dict stay, and copies of it
    are not compiled.

    Block by block: all blocks share the code that is compiled once for each shape and each kind of attention, gradients
    leave each block as soon as they are known (DDP sends them meanwhile), and a block is where all of the time goes.
    """
    torch._dynamo.config.recompile_limit = 64  # for students of many steps: sampling compiles each of them
    torch._dynamo.config.optimize_ddp = False  # it cuts a block into three graphs; blocks are small enough for DDP
    for module in modules:
        module.compile(fullgraph=True, dynamic=False)


def cast_weights(model: nn.Module, precision: str) -> None:
    """For inference only: keep the weights of matrix products in the format that autocast would cast them to each time.

    The results are the same to the bit, since autocast rounds alike; half the weights' memory and their traffic are
    saved. Linear maps and patch embeddings change, tables of labels and positions stay float32.
    """
    if DTYPES[precision] != torch.float32:
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(DTYPES[precision])


def inference_copy(model: Module, precision: str) -> Module:
    """The model with its weights cast for inference, in a copy: that of a model in training stays float32."""
    if DTYPES[precision] == torch.float32:
        return model
    copied = copy.deepcopy(model)
    cast_weights(copied, precision)
    return copied


class CUDAGraph:
    """A function of tensors that is recorded once as a CUDA graph and replayed: one launch in place of thousands.

    The first call fixes the shapes. Calls with others, on other devices, or where recording is not possible run the
    function as it is. Recorded at a call inside ``torch.no_grad`` and autocast, whose state it keeps.
    """

    def __init__(self, function: Callable[..., torch.Tensor], device: torch.device):
        self.function, self.possible = function, device.type == "cuda"
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[torch.Tensor, ...] = ()
        self.output = torch.empty(0)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The result of ``function(*inputs)``."""
        if self.possible and self.graph is None:
            self._record(inputs)
        if self.graph is None or [x.shape for x in inputs] != [x.shape for x in self.inputs]:
            return self.function(*inputs)
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.output.clone()

    def _record(self, inputs: tuple[torch.Tensor, ...]) -> None:
        self.inputs = tuple(x.clone() for x in inputs)
        try:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(3):  # compiles, and lets libraries choose their kernels, before anything is recorded
                    self.function(*self.inputs)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.output = self.function(*self.inputs)
            self.graph = graph
        except RuntimeError as error:  # something in the function waits for the device
            self.possible = False
            reason = str(error).splitlines()[0]
            print(f"--cuda-graph: nothing is recorded, drawing goes on without it ({reason})", file=sys.stderr)


def prepare_blocks(model: DiT, *, compile: bool, checkpoint_activations: bool) -> None:
    """Apply ``--compile`` and ``--checkpoint-activations``, in place."""
    model.checkpoint_activations = checkpoint_activations
    if compile:
        compile_each(model.blocks)


class SkipInit(TorchFunctionMode):
    """Skips the initialisation of ``torch.nn.init``."""

    def __torch_function__(self, func: Any, types: Any, inputs: tuple = (), named: dict | None = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return inputs[0] if inputs else (named or {})["tensor"]
        return func(*inputs, **(named or {}))


@contextmanager
def on_meta_device() -> Iterator[None]:
    """Modules made in here have shapes and no numbers. Nor are any drawn: for that torch would import its compiler."""
    with torch.device("meta"), SkipInit():
        yield
