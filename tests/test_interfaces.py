"""Names and arguments that others' code relies on: a refactor must not lose them, whatever happens behind."""

from inspect import signature

import pytest

from diffusion import create_diffusion
from evaluations import metrics
from models import DiT, DiT_models
from models_ard import ARD

DIT = ["input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "mlp_ratio"]
DIT += ["class_dropout_prob", "num_classes", "learn_sigma"]


@pytest.mark.parametrize(
    "function, arguments",
    [
        (DiT.__init__, dict.fromkeys(DIT, ...)),
        (DiT.forward, dict(x=..., t=..., y=...)),
        (DiT.forward_with_cfg, dict(x=..., t=..., y=..., cfg_scale=..., cfg_channels=3)),
        (create_diffusion, dict(timestep_respacing="")),
        (create_diffusion().training_losses, dict(model=..., x=..., t=..., model_kwargs=None, noise=None)),
        (create_diffusion().ddim_trajectory, dict(model=..., noise=..., y=..., cfg_scale=..., cfg_channels=3)),
        (ARD.from_teacher, dict(teacher=..., steps=4, mask="M4", history_layers=...)),
        (ARD.forward, dict(history=..., y=...)),
        (ARD.sample, dict(noise=..., y=...)),
        (metrics.frechet_distance, dict(mu1=..., sigma1=..., mu2=..., sigma2=...)),
        (metrics.inception_score, dict(probs=..., split_size=5000)),
        (metrics.precision_recall, dict(reference=..., samples=..., k=3)),
    ],
    ids=lambda value: getattr(value, "__qualname__", None),
)
def test_a_function_takes_these_arguments_in_this_order(function, arguments):
    found = {name: parameter.default for name, parameter in signature(function).parameters.items() if name != "self"}
    assert list(found)[: len(arguments)] == list(arguments)
    assert all(default in (..., found[name]) for name, default in arguments.items())


def test_the_official_sizes_have_their_names():
    assert {f"DiT-{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in (2, 4, 8)} <= DiT_models.keys()
