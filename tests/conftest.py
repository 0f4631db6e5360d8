"""Small real things that several tests share: teachers, students, stores, images, an autoencoder."""

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import: no test fetches anything
os.environ["WANDB_MODE"] = "offline"  # nor uploads it
pytest.register_assert_rewrite("helpers")
from helpers import GOLDEN, NANO_TEACHER, SMALL, arrays, call, draw_digits, save_autoencoder, write_images  # noqa: E402

from models import DiT  # noqa: E402

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start: their models are tiny
torch.set_num_threads(1)
# How long a machine that is busy takes to draw an example says nothing of the code.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The benchmark's cases come last: they backpropagate in this process, which the forks of others then cannot."""
    items.sort(key=lambda item: "bench" in item.path.parts)


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory) -> Path:
    """A Nano teacher after 200 training steps: its trajectories stay near the data."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    call("train.py", *NANO_TEACHER, "--data-path", "digits", "--no-hflip", "--global-batch-size", 64, "--lr", 2e-3,
         "--ema-decay", 0.9, "--log-every", 100, "--iterations", 200, "--run-dir", folder)  # fmt: skip
    return folder / "checkpoints" / "0000200.pt"


@pytest.fixture(scope="session")
def store(tmp_path_factory, teacher_file) -> Path:
    """A store of 50 of its trajectories in three shards."""
    folder = tmp_path_factory.mktemp("store") / "trajectories"
    call("sample_trajectory.py", "--teacher", teacher_file, "--out", folder, "--num-trajectories", 50,
         "--rows-per-shard", 20, "--per-proc-batch-size", 16)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def student_file(tmp_path_factory, store) -> Path:
    """A student of three training steps on that store."""
    folder = tmp_path_factory.mktemp("student") / "run"
    call("train_ARD.py", "--data-path", store, *SMALL, "--iterations", 3, "--run-dir", folder)
    return folder / "checkpoints" / "0000003.pt"


@pytest.fixture(scope="session")
def autoencoder(tmp_path_factory) -> Path:
    """A tiny AutoencoderKL that halves the side."""
    return save_autoencoder(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """Eleven photographs of noise in three classes, of several sizes, formats and modes."""
    folder, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(11):
        path = folder / f"class{i % 3}" / f"{i:02d}.{'png' if i % 2 else 'jpg'}"
        path.parent.mkdir(exist_ok=True)
        shape = (8 + 3 * i, 20 - i, 3) if i != 5 else (8, 9)
        Image.fromarray(draw.integers(256, size=shape, dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="session")
def encode(image_folder, autoencoder):
    """A function that encodes these images at 8 pixels into a store of three shards."""

    def into(out: Path, *more) -> Path:
        call("encode_latents.py", "--data-path", image_folder, "--image-size", 8, "--vae", autoencoder, "--out", out,
             "--rows-per-shard", 4, "--per-proc-batch-size", 3, "--num-workers", 0, "--dtype", "fp32",
             *more)  # fmt: skip
        return out

    return into


@pytest.fixture(scope="session")
def latent_store(encode, tmp_path_factory) -> Path:
    """The latents of these images."""
    return encode(tmp_path_factory.mktemp("latents") / "store")


@pytest.fixture(scope="session")
def digit_files(tmp_path_factory) -> tuple[Path, Path]:
    """The real digits and 400 noisy ones, as files for the evaluator."""
    folder = tmp_path_factory.mktemp("files")
    call("evaluations.digits", "reference", "--out", folder / "reference.npz")
    about = {"arr_1": np.zeros(400, np.int64), "provenance": np.array('{"seed": 7}')}
    return folder / "reference.npz", write_images(folder / "samples.npz", draw_digits(400, noise=60), **about)


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory) -> Path:
    """Random weights of Inception-v3, scaled so that the activations neither vanish nor explode."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)

    class Empty(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):  # torch-fidelity's constructor insists on loading a file
            pass

    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save({}, path)
    network = Empty("inception", ["2048"], str(path))
    for name, parameter in network.named_parameters():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(parameter)
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def inception(inception_weights):
    """The extractor with these weights."""
    from evaluations import features

    return features.extractor("inception", inception_weights=inception_weights).load()


@pytest.fixture(scope="session")
def official() -> dict[str, torch.Tensor]:
    """Inputs, weights ("w/...") and outputs ("out/...") of the official DiT code."""
    return {name: torch.from_numpy(value) for name, value in arrays(GOLDEN / "dit_official.npz").items()}


@pytest.fixture(scope="session")
def official_model(official) -> DiT:
    """Our model with the official code's weights."""
    model = DiT(input_size=8, patch_size=2, in_channels=4, hidden_size=48, depth=3, num_heads=4, num_classes=10).eval()
    model.load_state_dict({name.removeprefix("w/"): v for name, v in official.items() if name.startswith("w/")})
    return model


@pytest.fixture
def quick_compiler(monkeypatch):
    """torch.compile with all but code generation, which takes a minute on a CPU; counts the graphs that it made."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    return lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
