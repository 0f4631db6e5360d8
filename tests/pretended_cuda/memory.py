"""The peak of a training step's memory, tracked on tensors without numbers that say cuda:0, beside what is planned.

Of single cases also the number of the step's operations, each of which python starts: views are none, a graph is one.

    python tests/pretended_cuda/memory.py                         # the table of docs/gpu.md; minutes
    python tests/pretended_cuda/memory.py R:64 R+D:48:ckpt        # these cases only

A case is STAGE:BATCH of ``STAGES``, and :compiled or :ckpt (--checkpoint-activations) or both. Everything is in bf16,
on one GPU. Every operation of two real steps is run. Compiled blocks run as torch's partitioner cuts them into forward
and backward; of what lies within a graph, that is counted which goes into or out of a kernel that is not generated, for
code generation fuses the rest.
"""

import copy
import functools
import gc
import logging
import sys
import weakref
from dataclasses import replace
from typing import Any

from preload import devices, require

require()
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

plain_attention = F.scaled_dot_product_attention


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: Any = None, **named: Any) -> torch.Tensor:
    """The kernels that a GPU chooses; torch itself would ask the GPU."""
    if q.device.type != "cuda":
        return plain_attention(q, k, v, attn_mask=attn_mask, **named)
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    bias = torch.zeros(attn_mask.shape, dtype=q.dtype, device=q.device)
    bias = bias.expand(*q.shape[:3], k.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, torch.is_grad_enabled())[0]


F.scaled_dot_product_attention = attention  # before the models take it for a default
from functorch.compile import make_boxed_func  # noqa: E402
from torch._functorch.aot_autograd import aot_function  # noqa: E402
from torch._functorch.partitioners import min_cut_rematerialization_partition  # noqa: E402
from torch._inductor.decomposition import select_decomp_table  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.func import functional_call  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from costs.commands import plan_command  # noqa: E402
from costs.flops import TEXT_TOKENS, meta_model  # noqa: E402
from discriminator import AdversarialLosses, Discriminator, FrozenFeatures  # noqa: E402
from losses import regression_losses  # noqa: E402
from models_pixart import named_shape  # noqa: E402
from runtime.distributed import DistributedContext  # noqa: E402
from runtime.precision import autocast, cast_weights, on_meta_device, prepare_blocks  # noqa: E402
from trainer import Optimisation, TrainState  # noqa: E402

CARD, GB = torch.device("cuda", 0), 1e9
STUDENT = {"steps": 4, "mask": "M4", "history_layers": 6}
TEXT_STUDENT = {"steps": 3, "mask": "M4", "history_layers": 1}
STAGES = {
    "R": ("DiT-XL/2", 32, STUDENT),
    "R+D": ("DiT-XL/2", 32, STUDENT),
    "t2i-512": ("PixArt-XL/2", 64, TEXT_STUDENT),
    "t2i-1024": ("PixArt-XL/2", 128, TEXT_STUDENT),
}
TABLE = {"R": (8, 32, 64), "R+D": (6, 18, 48), "t2i-512": (8, 64), "t2i-1024": (2, 8, 64)}


class Track(TorchDispatchMode):
    """Bytes of the card's tensors that are alive, and their peak; how many operations were started."""

    NOT_GENERATED = ("mm", "addmm", "bmm", "convolution", "_scaled_dot_product", "cat")

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.operations = 0
        self.fused = False  # inside a graph
        self.sizes: dict[int, int] = {}

    def add(self, tensor: Any) -> None:
        if isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda":
            storage = tensor.untyped_storage()
            if (key := storage._cdata) not in self.sizes:
                self.sizes[key] = -(-storage.nbytes() // 512) * 512  # as the allocator rounds
                self.live += self.sizes[key]
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.drop, key)

    def drop(self, key: int) -> None:
        self.live -= self.sizes.pop(key, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations += func.namespace == "aten" and not self.fused and not func.is_view
        if not self.fused or func.__name__.startswith(self.NOT_GENERATED):
            for tensor in tree_leaves((out, args if self.fused else ())):
                self.add(tensor)
        return out

    def as_graph(self, graph: Any, _: Any) -> Any:
        """A "compiler" of what torch has cut out: it runs as it is."""

        def run(*inputs: Any) -> Any:
            self.fused, self.operations = True, self.operations + 1
            try:
                out = graph.forward(*inputs)
            finally:
                self.fused = False
            for tensor in tree_leaves(out):
                self.add(tensor)
            return out

        return make_boxed_func(run)


def on_card(model: Any) -> Any:
    """A model of the meta device, on the card."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                on = torch.empty_like(value, device=CARD)
                module._parameters[name] = torch.nn.Parameter(on, requires_grad=value.requires_grad)
        for name, value in module._buffers.items():
            module._buffers[name] = torch.empty_like(value, device=CARD)
    model.to = lambda _: model
    return model


def compile_as_cut(modules: Any, track: Track) -> None:
    """``compile_each``, without generated code: modules of one kind share what is cut into forward and backward."""
    cut: dict[Any, Any] = {}
    options: dict[str, Any] = {"fw_compiler": track.as_graph, "bw_compiler": track.as_graph}
    partition = functools.partial(min_cut_rematerialization_partition, compiler="inductor")
    for module in modules:
        names, weights = zip(*module.named_parameters(), strict=True)

        def forward(*inputs: Any, module: Any = module, names: Any = names, weights: Any = weights) -> torch.Tensor:
            tensors, functions = ([x for x in inputs if callable(x) is kind] for kind in (False, True))
            key = tuple(type(x) for x in functions), torch.is_grad_enabled()

            def run(weights: Any, tensors: Any) -> torch.Tensor:
                return functional_call(own, dict(zip(names, weights, strict=True)), (*tensors, *functions))

            own = type(module).__new__(type(module))
            own.__dict__ = {name: value for name, value in module.__dict__.items() if name != "forward"}
            if key not in cut:
                cut[key] = aot_function(
                    run,
                    **options,
                    partition_fn=partition,
                    decompositions=select_decomp_table(),
                )
            return cut[key](weights, tensors)

        module.forward = forward


def outlines(stage: str, checkpoint_activations: bool) -> list[Any]:
    """The student, its teacher and the discriminator of a stage, on the meta device."""
    name, side, shape = STAGES[stage]
    config = config_of(name, side)
    models: list[Any] = [meta_model(config | shape)]
    if stage != "R":
        models.append(meta_model(config).requires_grad_(False))
        cast_weights(models[1], "bf16")
    for model in models:
        prepare_blocks(model, compile=False, checkpoint_activations=checkpoint_activations)
    if stage == "R+D":
        with on_meta_device():
            heads = Discriminator(1, config["hidden_size"])
        heads.heads = torch.nn.ModuleList(copy.deepcopy(heads.heads[0]) for _ in models[1].blocks)
        models.append(heads)
    return models


def step_of(student: Any, teacher: Any, heads: Any, batch: int, compile: bool, track: Track) -> tuple[int, int]:
    """The peak of the second of two steps, in bytes, and its operations."""
    context, text = DistributedContext(device=CARD), "caption_channels" in student.config
    y = torch.zeros(batch, TEXT_TOKENS, 4096, dtype=torch.float16, device=CARD) if text else torch.zeros(
        batch, dtype=torch.long, device=CARD)  # fmt: skip
    optimisation = Optimisation(global_batch_size=batch)
    state = TrainState(student, context, optimisation)
    if heads:
        d_state = TrainState(heads, context, replace(optimisation, clip=None, ema_decay=None))
        for head in heads.heads:
            head.leave.get_parameter = functools.partial(getattr, head.leave)
        adversarial = AdversarialLosses(student, heads, FrozenFeatures(teacher), samples=batch)
    if compile:
        for modules in (student.blocks, teacher and teacher.blocks, heads and heads.heads):
            compile_as_cut(modules or (), track)
    for _ in range(2):
        gc.collect()
        track.peak, track.operations = track.live, 0
        trajectory = torch.zeros(batch, student.steps + 1, *student.latent_shape, device=CARD)
        data = {"trajectory": trajectory, "y": y}
        if heads:
            data |= {"real": trajectory[:, 0].clone(), "real_y": y}
            with autocast("bf16", CARD):
                losses, fake = adversarial.student_losses(data, 10.0)
            state.backward(losses)
            state.step()
            with autocast("bf16", CARD):
                losses = adversarial.discriminator_losses(data | {"fake": fake})
            d_state.backward(losses)
            d_state.step()
            del fake
        else:
            if text:
                with torch.no_grad(), autocast("bf16", CARD):
                    both = (
                        torch.cat([trajectory[:, 0]] * 2),
                        torch.zeros(2 * batch, device=CARD),
                        torch.cat([y.float()] * 2),
                    )
                    teacher.forward_with_cfg(*both, 4.5, 4)
                    del both
            with autocast("bf16", CARD):
                predictions = state.ddp_model(trajectory[:, :-1], y)
                losses = {"loss": regression_losses(predictions, trajectory)}
            state.backward(losses)
            state.step()
            del predictions
        del losses, data, trajectory
    return track.peak, track.operations


def config_of(name: str, side: int) -> dict:
    """The config of a public model for latents of that side."""
    return named_shape(name) | {"input_size": side} | ({"position_scale": side / 64} if "PixArt" in name else {})


def planned(stage: str, batch: int, compile: bool, ckpt: bool) -> int:
    """What the plan says of the same."""
    name, side, shape = STAGES[stage]
    teacher = config_of(name, side)
    text_tokens = TEXT_TOKENS if "caption_channels" in teacher else 0
    options = {"global_batch_size": batch, "accumulation": 1, "iterations": 1, "ckpt_every": 1, "keep": 0}
    options |= {"precision": "bf16", "compile": compile, "checkpoint_activations": ckpt}
    options |= {"online": bool(text_tokens), "solver_steps": 48, "cfg_scale": 4.5, "guidance_interval": None}
    options |= {"d_time": 0, "d_width": None, "bn_group": 6, "rollout": False}
    script, context = "train_ARD_gan.py" if stage == "R+D" else "train_ARD.py", DistributedContext()
    plan = plan_command(script, teacher | shape, options, context, teacher=teacher, text_tokens=text_tokens)
    return sum(plan.memory.values())


def measure(case: str) -> tuple[float, float, int]:
    """Plan and peak of a case in GB, and the operations of a step."""
    stage, batch, *how = case.split(":")
    batch_size, compile, ckpt = int(batch), "compiled" in how, "ckpt" in how
    models = outlines(stage, ckpt)
    with FakeTensorMode(allow_non_fake_inputs=True), Track() as track:
        models = [on_card(model) for model in models]
        student, teacher, heads = [*models, None, None][:3]
        del models
        peak, operations = step_of(student, teacher, heads, batch_size, compile, track)
    return planned(stage, batch_size, compile, ckpt) / GB, peak / GB, operations


def prepare() -> None:
    """Answers that torch wants of a GPU."""
    devices()
    logging.disable(logging.ERROR)  # of torch's compiler, which wants to know the GPU's name for its statistics
    torch.cuda.is_available = lambda: True
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.cuda.get_rng_state = lambda *_: torch.zeros(16, dtype=torch.uint8)
    torch.cuda.set_rng_state = lambda *_: None
    torch.backends.cudnn.enabled = False
    torch.__future__.set_overwrite_module_params_on_conversion(True)


def table() -> None:
    """Print the plan beside the peak for all cases, in Markdown."""
    ways = {"": "plain", ":compiled": "`--compile`", ":ckpt": "`--checkpoint-activations`", ":compiled:ckpt": "both"}
    print("| step | samples | " + " | ".join(ways.values()) + " |\n" + "|---" * (2 + len(ways)) + "|")
    for stage, batches in TABLE.items():
        for batch in batches:
            pairs = (measure(f"{stage}:{batch}{way}") for way in ways)
            print(
                f"| {stage} | {batch} | " + " | ".join("{:.1f} / {:.1f}".format(*pair[:2]) for pair in pairs) + " |",
                flush=True,
            )
    print("\nGB, planned / tracked. bf16, one GPU.")


if __name__ == "__main__":
    prepare()
    for case in sys.argv[1:]:
        print("{} {:.1f} {:.1f}, {} operations".format(case, *measure(case)), flush=True)
    if not sys.argv[1:]:
        table()
