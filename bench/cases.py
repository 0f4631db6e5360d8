"""The cases of benchmark.py: each stage of the pipeline as a piece of work to time, with its FLOPs, on random weights.

A case is made from ``options``, the command line's by name.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.dense import DenseARD
from bench.timing import Case
from costs.flops import count_flops, count_gan_step, sampling_gflops
from costs.stages import INCEPTION_GFLOPS
from diffusion import process_of
from diffusion.teacher_ode import grid_steps, pick_points
from discriminator import AdversarialLosses, Discriminator, FrozenFeatures
from evaluations.extraction import extract
from evaluations.features import InceptionFeatures
from evaluations.metrics import frechet_distance, precision_recall, statistics
from losses import regression_losses
from models import DiT, DiT_models
from models_ard import ARD
from runtime.cli import UserError
from runtime.distributed import DistributedContext
from runtime.precision import CUDAGraph, autocast, cast_weights, compile_each, on_meta_device, prepare_blocks
from runtime.randomness import Shuffle
from runtime.vae import VAE
from stores.image_arrays import Images
from stores.shards import ShardWriter
from stores.trajectories import NEEDED, TrajectoryStore
from trainer import Optimisation, TrainState


def build_model(options: dict, device: torch.device) -> Any:
    """A teacher, or the student of one if there is "stack", in which nothing is zero as it would be initially."""
    with torch.device(device):
        model = DiT_models[options["model"]](input_size=options["input_size"])
        if "stack" in options:
            try:
                model = ARD.from_teacher(model, options["steps"], options["mask"], options["stack"])
            except ValueError as error:
                raise UserError(f"--steps {options['steps']} --stack {options['stack']}: {error}") from None
            if options.get("dense"):
                dense = DenseARD(**model.config)
                dense.load_state_dict(model.state_dict())
                model = dense
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def training_batch(model: ARD, size: int, device: Any) -> dict[str, torch.Tensor]:
    """A batch of trajectories with labels, as the store gives them."""
    shape = (size, model.steps + 1, *model.latent_shape)
    return {"trajectory": torch.randn(shape, device=device), "y": torch.arange(size, device=device) % 1000}


def train_case(options: dict, context: DistributedContext) -> Case:
    """A step of train_ARD.py on a batch that is on the device: losses, gradients, clipping, AdamW, EMA."""
    model, size = build_model(options, context.device), options["batch_size"]

    def losses(student: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return regression_losses(student(batch["trajectory"][:, :-1], batch["y"]), batch["trajectory"])

    with on_meta_device():
        counted = ARD(**model.config)
    flops = count_flops(lambda: losses(counted, training_batch(counted, 1, "meta")).sum().backward())
    prepare_blocks(model, compile=options["compile"], checkpoint_activations=options["checkpoint_activations"])
    sizes = Optimisation(global_batch_size=size, accumulation=options["accumulation"])
    state = TrainState(model, context, sizes)
    batch = training_batch(model, len(context.share(size)), context.device)

    def work() -> None:
        for part in state.micro_batches(batch):
            with autocast(options["precision"], context.device):
                loss = losses(state.ddp_model, part)
            state.backward({"loss": loss})
        state.step()

    return Case(work, size, flops * len(context.share(size)), options["precision"])


def gan_case(options: dict, context: DistributedContext) -> Case:
    """A step of train_ARD_gan.py, past its warm-up: the student's turn and the discriminator's."""
    student, size, device = build_model(options, context.device), options["batch_size"], context.device
    teacher = build_model({name: options[name] for name in ("model", "input_size")}, device)
    with torch.device(device):
        heads = Discriminator.for_teacher(teacher)
    cost = count_gan_step(student.config, teacher.config, d_time=0, d_width=None, bn_group=6, rollout=False)
    cast_weights(teacher, options["precision"])
    for model in (student, teacher):
        prepare_blocks(model, compile=options["compile"], checkpoint_activations=options["checkpoint_activations"])
    if options["compile"]:
        compile_each(heads.heads)
    optimisation = Optimisation(global_batch_size=size)
    state = TrainState(student, context, optimisation)
    d_state = TrainState(heads, context, replace(optimisation, clip=None, ema_decay=None))
    features = FrozenFeatures(teacher)
    adversarial = AdversarialLosses(
        state.ddp_model, d_state.ddp_model, features, total=context.all_reduce, samples=size
    )
    batch = training_batch(student, len(context.share(size)), device)
    batch |= {"real": torch.randn_like(batch["trajectory"][:, 0]), "real_y": batch["y"]}

    def work() -> None:
        with autocast(options["precision"], device):
            losses, fake = adversarial.student_losses(batch, gan_weight=10.0)
        state.backward(losses)
        state.step()
        with autocast(options["precision"], device):
            losses = adversarial.discriminator_losses(batch | {"fake": fake})
        d_state.backward(losses)
        d_state.step()

    return Case(work, size, cost["tflops_per_sample"]["R+D"] * 1e12 * len(context.share(size)), options["precision"])


def drawing_case(model: DiT, draw: Callable, flops: float, options: dict, device: torch.device) -> Case:
    """A case of ``draw(noise, y)`` without gradients; ``flops`` of one sample."""
    cast_weights(model, options["precision"])
    if options["compile"]:
        compile_each(model.blocks)
    size = options["batch_size"]
    noise, y = torch.randn(size, *model.latent_shape, device=device), torch.arange(size, device=device) % 1000

    @torch.no_grad()
    def work() -> None:
        with autocast(options["precision"], device):
            draw(noise, y)

    return Case(work, size, flops * size, options["precision"])


def sample_case(options: dict, context: DistributedContext) -> Case:
    """The latents that sample_ARD.py draws, all steps."""
    model = build_model(options, context.device)
    with on_meta_device():
        flops = 2e9 * sampling_gflops(ARD(**model.config), model.steps)
    draw = CUDAGraph(model.sample, context.device) if options["cuda_graph"] else model.sample
    return drawing_case(model, draw, flops, options, context.device)


def trajectories_case(options: dict, context: DistributedContext) -> Case:
    """The teacher's states that sample_trajectory.py dumps, with guidance 1.5."""
    points, model = grid_steps(4), build_model(options, context.device)
    with on_meta_device():  # its positions come from numpy
        flops = 2e9 * sampling_gflops(DiT(**model.config).to("meta"), 25)

    def draw(noise: torch.Tensor, y: torch.Tensor) -> object:
        return pick_points(*process_of(model).trajectory(model, noise, y, 25, 1.5), points)

    return drawing_case(model, draw, flops, options, context.device)


def decode_case(options: dict, context: DistributedContext) -> Case:
    """The decoder that samplers use, Stable Diffusion's autoencoder at the given width of its first stage."""
    from diffusers import AutoencoderKL

    shape = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": [options["width"] * factor for factor in (1, 2, 4, 4)],
        "layers_per_block": 2,
        "norm_num_groups": min(32, options["width"]),
    }
    with tempfile.TemporaryDirectory() as folder:
        whole: Any = AutoencoderKL(**shape)
        whole.save_pretrained(folder)
        vae = VAE(folder, context.device, options["precision"], options["compile"])
    latents = torch.randn(options["batch_size"], 4, options["input_size"], options["input_size"], device=context.device)
    with on_meta_device():
        counted: Any = AutoencoderKL(**shape)
        flops = count_flops(lambda: counted.decode(torch.empty(1, *latents.shape[1:])))
    return Case(lambda: vae.decode(latents), len(latents), flops * len(latents), options["precision"])


def features_case(options: dict, context: DistributedContext) -> Case:
    """The evaluator's work on a file of images: reading them and Inception-v3, here with random weights."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict: dict) -> None:
            """Keep the initial weights: torch-fidelity's constructor insists on a file."""

    count, size = 4 * options["batch_size"], options["image_size"]
    folder = tempfile.TemporaryDirectory()
    weights, file = Path(folder.name) / "weights.pth", Path(folder.name) / "images.npz"
    torch.save({}, weights)
    torch.save(Unloaded("inception", ["2048"], str(weights)).state_dict(), weights)
    np.savez(file, arr_0=np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8))
    network, images = InceptionFeatures(context.device, weights, options["tf32"]).load(), Images("images", file)

    def work(folder: tempfile.TemporaryDirectory = folder) -> None:  # which keeps the files there
        extract(images, network, options["batch_size"], DistributedContext(device=context.device))

    return Case(work, count, 1e9 * INCEPTION_GFLOPS * count)


def store_cases(options: dict, folder: Path) -> dict[str, Case]:
    """Batches out of the store, against one .npz for each point and against a copy of as many bytes in a row."""
    rows, batch_size, points = options["rows"], options["batch_size"], 4
    shape = (rows, 4, 32, 32)
    data = {"noise": torch.randn(shape), "xt": torch.randn(rows, points, *shape[1:])}
    data = {name: value.half() for name, value in data.items()} | {"label": torch.arange(rows) % 1000}
    about = dict.fromkeys(NEEDED) | {"count": rows, "rows_per_shard": rows, "solver_indices": grid_steps(points)}
    with ShardWriter(folder / "store", about, DistributedContext(), unit="trajectory") as writer:
        writer.write(range(rows), data)
    store = TrajectoryStore(folder / "store")
    for row in range(rows):
        for k, latent in enumerate([data["noise"][row], *data["xt"][row]]):
            np.savez(folder / f"{row}-{k}.npz", latent=latent.numpy(), label=row % 1000)
    shuffle, position = Shuffle(rows, seed=0), iter(range(0, 10**9, batch_size))

    def next_rows() -> np.ndarray:
        start = next(position)
        return shuffle.rows(start, start + batch_size)

    def load(row: int, k: int) -> np.ndarray:
        with np.load(folder / f"{row}-{k}.npz") as file:
            return file["latent"]

    def read_files() -> torch.Tensor:
        latents = [[load(row, k) for k in range(points + 1)] for row in next_rows()]
        return torch.from_numpy(np.stack(latents)).float()

    stored = data["xt"].flatten(0, 1)
    count = min(batch_size * (points + 1), len(stored))
    works: dict[str, Callable] = {
        "store": lambda: store.read(next_rows(), "xt", list(range(points))),
        "files": read_files,
        "copy": lambda: stored[:count].clone().float(),
    }
    return {name: Case(work, batch_size) for name, work in works.items()}


def metrics_cases(options: dict, device: torch.device) -> dict[str, Case]:
    """The two slow figures of the evaluator, at the width of ADM's features."""
    random, width = np.random.default_rng(0), 2048
    real = random.standard_normal((options["reference"], width), dtype=np.float32)
    drawn = random.standard_normal((options["samples"], width), dtype=np.float32)
    both = (*statistics(drawn), *statistics(real))
    return {
        "frechet": Case(lambda: frechet_distance(*both), 1),
        "precision_recall": Case(lambda: precision_recall(real, drawn, device=device), options["samples"]),
    }
