"""DINOv2's features against the network's definition written out, and FD-DINOv2 against scipy's matrix root.

A small network with random weights by Meta's names stands for ViT-L/14; ``written_out`` is its definition in float64.
Then the distance and its name in figures and printing; last, weights that are others and where they are looked for.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torchvision.transforms.v2.functional as TF
from helpers import arrays, call, refused, write_images

from evaluations import dinov2
from evaluations.evaluator import Evaluation, show
from evaluations.features import Dinov2Features
from evaluations.quality import PeriodicEvaluator, QualityOptions
from runtime.distributed import DistributedContext

SMALL = {"width": 64, "depth": 2, "heads": 2}


def random_state(width: int, depth: int, heads: int) -> dict[str, torch.Tensor]:
    """Weights by Meta's names. All are windows of one row of numbers, so that a file of them is small."""
    row = 0.02 * torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    state = {}

    def add(name: str, *shape: int, mean: float = 0.0) -> None:
        window = torch.as_strided(row, shape, [1] * len(shape), storage_offset=len(state) * 7)
        state[name] = window + mean if mean else window

    add("cls_token", 1, 1, width)
    add("pos_embed", 1, 1 + 37 * 37, width)
    add("mask_token", 1, width)
    add("patch_embed.proj.weight", width, 3, 14, 14)
    add("patch_embed.proj.bias", width)
    for i in range(depth):
        for name, shape, mean in (
            ("norm1.weight", (width,), 1.0), ("norm1.bias", (width,), 0.0),
            ("attn.qkv.weight", (3 * width, width), 0.0), ("attn.qkv.bias", (3 * width,), 0.0),
            ("attn.proj.weight", (width, width), 0.0), ("attn.proj.bias", (width,), 0.0),
            ("ls1.gamma", (width,), 1.0),
            ("norm2.weight", (width,), 1.0), ("norm2.bias", (width,), 0.0),
            ("mlp.fc1.weight", (4 * width, width), 0.0), ("mlp.fc1.bias", (4 * width,), 0.0),
            ("mlp.fc2.weight", (width, 4 * width), 0.0), ("mlp.fc2.bias", (width,), 0.0),
            ("ls2.gamma", (width,), 1.0),
        ):  # fmt: skip
            add(f"blocks.{i}.{name}", *shape, mean=mean)
    add("norm.weight", width, mean=1.0)
    add("norm.bias", width)
    return state


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A small network's."""
    path = tmp_path_factory.mktemp("dinov2") / "small.pth"
    draw = torch.Generator().manual_seed(1)
    state = random_state(**SMALL)
    torch.save({name: value + 0.1 * torch.randn(value.shape, generator=draw) for name, value in state.items()}, path)
    return path


@pytest.fixture(scope="module")
def network(weights) -> Dinov2Features:
    return Dinov2Features(weights=weights, **SMALL).load()


def pictures(count: int, side: int = 20, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def cubic(before: int, after: int, scale: float) -> torch.Tensor:
    """Bicubic interpolation of a row as a matrix (after, before): Keys' kernel, a = -0.75, the ends are repeated."""
    matrix = torch.zeros(after, before, dtype=torch.float64)
    for i in range(after):
        at = (i + 0.5) / scale - 0.5
        for j in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            x = abs(at - j)
            near, far = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            matrix[i, min(max(j, 0), before - 1)] += near if x <= 1 else far if x < 2 else 0
    return matrix


def written_out(state: dict[str, torch.Tensor], x: torch.Tensor, depth: int, heads: int) -> torch.Tensor:
    """The class token of a vision transformer of images (B, 3, 224, 224), in float64."""
    w = {name: value.double() for name, value in state.items()}
    width = w["cls_token"].shape[-1]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    patches = x.double().unfold(2, 14, 14).unfold(3, 14, 14)  # (B, 3, 16, 16, 14, 14)
    tokens = patches.permute(0, 2, 3, 1, 4, 5).reshape(len(x), 256, -1) @ w["patch_embed.proj.weight"].flatten(1).T
    resize = cubic(37, 16, 16.1 / 37)
    grid = w["pos_embed"][0, 1:].reshape(37, 37, width)
    grid = torch.einsum("ia,jb,abd->ijd", resize, resize, grid).reshape(256, width)
    own = (w["cls_token"] + w["pos_embed"][:, :1]).expand(len(x), -1, -1)
    tokens = torch.cat([own, tokens + w["patch_embed.proj.bias"] + grid], dim=1)
    for i in range(depth):
        b = f"blocks.{i}"
        three = linear(norm(tokens, f"{b}.norm1"), f"{b}.attn.qkv").unflatten(2, (3, heads, -1))
        q, k, v = three.permute(2, 0, 3, 1, 4)  # (B, heads, 257, d) each
        seen = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        tokens = tokens + w[f"{b}.ls1.gamma"] * linear(seen.transpose(1, 2).flatten(2), f"{b}.attn.proj")
        inner = linear(norm(tokens, f"{b}.norm2"), f"{b}.mlp.fc1")
        inner = inner * (1 + torch.erf(inner / 2**0.5)) / 2
        tokens = tokens + w[f"{b}.ls2.gamma"] * linear(inner, f"{b}.mlp.fc2")
    return norm(tokens, "norm")[:, 0]


@pytest.mark.parametrize("side", [20, 256])
def test_features_are_those_of_the_network_written_out(weights, network, side):
    images = pictures(2, side)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    x = TF.resize(x, [224, 224], interpolation=TF.InterpolationMode.BICUBIC, antialias=True)
    x = TF.normalize(x / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    state = torch.load(weights, weights_only=True)
    wanted = written_out(state, x, SMALL["depth"], SMALL["heads"])
    found = network(images)
    np.testing.assert_allclose(found["pool"], wanted, atol=1e-4)
    assert found["pool"].shape == (2, 64) and found["pool"].dtype == np.float32
    assert found["probs"] is found["spatial"] is None and network.widths == {"pool": 64}
    timms = torch.nn.functional.interpolate(
        state["pos_embed"][:, 1:].reshape(1, 37, 37, 64).permute(0, 3, 1, 2), size=16, mode="bicubic", antialias=True
    )
    difference = dinov2.positions(state["pos_embed"])[0, 1:] - timms.flatten(2).mT[0]
    assert difference.abs().max() > 0.05  # what would be otherwise if timm resized them


def test_features_do_not_depend_on_the_batch_size(network):
    images = pictures(7)
    alone = np.concatenate([network(image[None])["pool"] for image in images])
    np.testing.assert_allclose(alone, network(images)["pool"], atol=1e-5)


def test_fd_dinov2_is_the_frechet_distance_and_is_not_called_fid(network, tmp_path, capsys):
    images = pictures(66), pictures(70, seed=1) // 2
    inceptions = {"mu": np.zeros(2048), "sigma": np.eye(2048)}  # of another network, as ADM's reference has them
    files = [
        write_images(tmp_path / "reference.npz", images[0], **inceptions),
        write_images(tmp_path / "samples.npz", images[1]),
    ]
    result = Evaluation(*files, network).run(64, DistributedContext(), True, True, with_kid=True)
    (mu, sigma), (mu2, sigma2) = (
        (pool.mean(0), np.cov(pool, rowvar=False)) for pool in (network(of)["pool"].astype(np.float64) for of in images)
    )
    root = scipy.linalg.sqrtm(sigma @ sigma2).real
    wanted = np.square(mu - mu2).sum() + np.trace(sigma + sigma2 - 2 * root)
    assert result["fd_dinov2"] == pytest.approx(wanted, rel=1e-4) and result["fd_dinov2"] > 1e-3
    assert "fid" not in result and result["inception_score"] is result["sfid"] is None
    assert result["kid"]["features"] == "dinov2" and 0 <= result["precision"] <= 1
    seen = result["provenance"]
    assert seen["features"] == "dinov2" and not seen["adm"] and "timm" in seen["versions"]
    assert seen["stored_statistics"] == []
    assert seen["weights_sha256"] == network.weights_sha256 and (tmp_path / "samples.dinov2.features.npz").is_file()
    show(result, network)
    out, error = capsys.readouterr()
    assert f"FD-DINOv2 (dinov2 features, not ADM): {result['fd_dinov2']:.6g}\n" in out and "FID" not in out + error
    assert "FD-DINOv2-70 (dinov2 features, not ADM) (not as published: other DINOv2 weights than Meta's" in out
    assert "KID (dinov2 features, 100 subsets of 66): " in out and "FD-DINOv2 of 70 samples is higher" in error


def test_other_weights_are_refused(digit_files, weights, tmp_path, capsys, monkeypatch):
    command = ("evaluations.evaluator", *digit_files, "--device", "cpu", "--features", "dinov2", "--allow-few")
    given = (*command, "--dinov2-weights")
    (tmp_path / "text").write_text("hello")
    torch.save({"w": torch.zeros(1)}, tmp_path / "other")
    torch.save(Path("a pickle"), tmp_path / "pickle")
    state = torch.load(weights, weights_only=True)
    torch.save(state | {"register_tokens": torch.zeros(1, 4, 64)}, tmp_path / "registers")
    for name, match in (
        ("text", "it is no file of torch.save"), ("pickle", "Python objects"), ("other", "names or shapes differ"),
        ("registers", "names or shapes differ"), (weights, "names or shapes differ"),
    ):  # fmt: skip
        error = refused(capsys, *given, tmp_path / name)
        assert f"--dinov2-weights {tmp_path / name}: not the weights of DINOv2's ViT-L/14" in error and match in error
    assert "no such file" in refused(capsys, *given, tmp_path / "absent")
    digits = (*given, weights, "--features", "digits")
    assert f"--dinov2-weights {weights}: of no use with --features digits" in refused(capsys, *digits)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing answers there: the machine is offline
    where = tmp_path / "cache/hub/checkpoints/dinov2_vitl14_pretrain.pth"
    assert f"fetch {dinov2.URL} to {where}" in refused(capsys, *command)
    call(*command, "--dry-run")
    assert f"would be fetched from {dinov2.URL} to {where}" in json.loads(capsys.readouterr().out)["fetch"][0]


@pytest.mark.slow
def test_the_command_finds_the_large_network_in_torchs_cache(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save(random_state(1024, 24, 16), tmp_path / "hub/checkpoints/dinov2_vitl14_pretrain.pth")
    reference = write_images(tmp_path / "reference.npz", pictures(1024, 8))
    few = write_images(tmp_path / "few.npz", pictures(4, 8, seed=2))
    command = ("evaluations.evaluator", few, few, "--features", "dinov2", "--device", "cpu", "--kid", "--json",
               tmp_path / "out.json")  # fmt: skip
    assert "4 images, give 1024 or --allow-few" in refused(capsys, *command)
    call(*command, "--allow-few", "--dry-run")
    assert json.loads(capsys.readouterr().out)["features"] == "dinov2" and not (tmp_path / "out.json").exists()
    (tmp_path / "out.json").write_text('{"fd_dinov2": 1.0}')  # of an earlier call: it is replaced
    call(*command, "--allow-few")
    result, out = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out
    assert "FD-DINOv2-4 (dinov2 features, not ADM) (not as published" in out
    assert 0 <= result["fd_dinov2"] < 1e-3 and (result["precision"], result["recall"]) == (1, 1)  # from itself
    assert arrays(tmp_path / "few.dinov2.features.npz")["pool"].std(axis=0).min() > 0  # and not for being all alike

    sampler, options = object(), {"eval_reference": str(reference), "eval_features": "dinov2"}
    assert PeriodicEvaluator(sampler, DistributedContext(), 8, QualityOptions(**options)).figures[0] == "fd_dinov2"
