"""Teachers and students of other people's making: the same weights in every layout are the same model.

A DiT of diffusers in every layout; the config from shapes; caches and the network; files that are broken, each named;
then the authors' students, what wraps a state dict, and paths that are misspelt.
"""

import argparse
import copy
import json
import os
import shutil

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import Timesteps
from helpers import GOLDEN, arrays, call, refused, save_teacher, spawn

from models import DiT, DiT_models
from models_ard import ARD
from runtime.cli import UserError
from stores import checkpoints, foreign_weights

SHAPE = dict(num_attention_heads=2, attention_head_dim=16, num_layers=3, in_channels=4, out_channels=8, sample_size=6)


@pytest.fixture(scope="module")
def theirs() -> DiTTransformer2DModel:
    """A random DiT-Nano/2 of diffusers whose blocks share their embedders, as in all converted weights."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(**SHAPE, num_embeds_ada_norm=10, norm_eps=1e-6).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return model


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    """The same as a folder of diffusers."""
    path = tmp_path_factory.mktemp("diffusers")
    theirs.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def state(folder):
    """The same by DiT's own names."""
    return checkpoints.load_teacher(folder)[0].state_dict()


def saved(path, content):
    torch.save(content, path)
    return path


def inputs():
    torch.manual_seed(1)
    return torch.randn(4, 4, 6, 6), torch.tensor([0, 7, 500, 999]), torch.tensor([0, 3, 9, 10])


@torch.no_grad()
def test_a_diffusers_folder_equals_diffusers_model(theirs, folder):
    """Up to diffusers' own deviation from DiT in the frequencies of the time, which this test undoes."""
    model, config = checkpoints.load_teacher(folder)
    assert config["model"] == model.config | DiT_models["DiT-Nano/2"].keywords
    assert config["vae"] == "stabilityai/sd-vae-ft-ema" and model.num_classes == 10
    x, t, y = inputs()
    official = copy.deepcopy(theirs)
    for block in official.transformer_blocks:
        block.norm1.emb.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(model(x, t, y), official(x, t, y).sample, rtol=0, atol=1e-5)
    zero = torch.zeros_like(t)  # where their frequencies do not matter
    torch.testing.assert_close(model(x, zero, y), theirs(x, zero, y).sample, rtol=0, atol=1e-5)


@torch.no_grad()
def test_every_layout_gives_the_same_model(theirs, folder, state, tmp_path):
    options = argparse.Namespace(model="DiT-Nano/2", global_batch_size=256)
    pipeline, binary = tmp_path / "pipeline", tmp_path / "binary"
    theirs.save_pretrained(pipeline / "transformer")
    binary.mkdir()
    (binary / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save(theirs.state_dict(), binary / "diffusion_pytorch_model.bin")
    wrapped = {"model": {k: v + 1 for k, v in state.items()}, "ema": state, "opt": {"state": {}}, "args": options}
    sources = {
        "official": saved(tmp_path / "DiT-Nano-2-6x6.pt", state),
        "training script": saved(tmp_path / "0400000.pt", wrapped),
        "ours": save_teacher(tmp_path / "ours.pt", checkpoints.load_teacher(folder)[0]),
        "pipeline": pipeline,
        "binary": binary,
    }
    x, t, y = inputs()
    first, config = checkpoints.load_teacher(folder)
    for source in sources.values():
        model, other = checkpoints.load_teacher(source)
        assert model.config == first.config and not model.training
        torch.testing.assert_close(model(x, t, y), first(x, t, y), rtol=0, atol=1e-5)
        assert other["provenance"]["teacher_hash"] == config["provenance"]["teacher_hash"]
        assert other["provenance"]["teacher"] == str(source)
    raw, _ = checkpoints.load_teacher(sources["training script"], weights="raw")
    assert torch.equal(raw.state_dict()["final_layer.linear.bias"], state["final_layer.linear.bias"] + 1)
    with pytest.raises(UserError, match="has no raw weights"):
        checkpoints.load_teacher(sources["official"], weights="raw")


def test_half_precision_files_become_float32(state, tmp_path):
    model, _ = checkpoints.load_teacher(saved(tmp_path / "DiT-half-6x6.pt", {k: v.half() for k, v in state.items()}))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("size, patch, side", [("XL", 2, 32), ("XL", 2, 64), ("S", 8, 32), ("Micro", 4, 20)])
@pytest.mark.parametrize("classes, channels, learn_sigma", [(1000, 4, True), (0, 3, False)])
def test_the_config_follows_from_shapes(size, patch, side, classes, channels, learn_sigma):
    shape = dict(input_size=side, in_channels=channels, num_classes=classes, learn_sigma=learn_sigma)
    with torch.device("meta"):
        model = DiT_models[f"DiT-{size}/{patch}"](**shape)
    assert foreign_weights.dit_config(model.state_dict(), "file") == model.config


@pytest.mark.parametrize("width, hidden", [(36, 101), (49, 101), (1152, 4607)])
def test_any_width_inside_the_blocks_is_found_again(width, hidden):
    with torch.device("meta"):
        state = DiT(depth=1, hidden_size=48, num_heads=1, input_size=4).state_dict()
    state["x_embedder.proj.weight"] = torch.empty(width, 4, 2, 2, device="meta")
    state["blocks.0.mlp.fc1.weight"] = torch.empty(hidden, width, device="meta")
    assert int(width * foreign_weights.dit_config(state, "file", heads=1)["mlp_ratio"]) == hidden


def test_an_official_name_is_found_in_the_cache(state, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    saved(tmp_path / "hub" / "checkpoints" / "DiT-XL-2-256x256.pt", state)  # the name says where, the shapes what
    assert checkpoints.load_teacher("DiT-XL-2-256x256.pt")[1]["provenance"]["teacher"] == "DiT-XL-2-256x256.pt"


def test_a_hub_id_is_found_in_the_cache(folder, tmp_path, monkeypatch):
    repository, revision = tmp_path / "hub" / "models--facebook--DiT-XL-2-256", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    (repository / "snapshots" / revision).mkdir(parents=True)
    (repository / "snapshots" / revision / "transformer").symlink_to(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))  # $HF_HOME/hub, read once
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = checkpoints.load_teacher("facebook/DiT-XL-2-256")[1]["provenance"]
    assert found["teacher_hash"] == checkpoints.load_teacher(folder)[1]["provenance"]["teacher_hash"]


@pytest.mark.parametrize(
    "teacher, tells",
    [
        ("DiT-XL-2-256x256.pt", ("https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt", "CACHE/hub/checkp")),
        ("facebook/DiT-XL-2-256", ("hf download facebook/DiT-XL-2-256", "--local-dir")),
    ],
)
def test_offline_ends_in_one_sentence_with_what_to_fetch(teacher, tells, tmp_path):
    store, nowhere = tmp_path / "store", "http://127.0.0.1:9"
    caches = {"TORCH_HOME": str(tmp_path), "HF_HOME": str(tmp_path)}
    no_network = {"HF_HUB_OFFLINE": "1", "HTTPS_PROXY": nowhere, "https_proxy": nowhere}
    done = spawn("sample_trajectory.py", "--teacher", teacher, "--out", store, "--num-trajectories", 1,
                 env=os.environ | caches | no_network)  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert f"--teacher {teacher}: " in done.stderr and not store.exists()
    for text in tells:
        assert text.replace("CACHE", str(tmp_path)) in done.stderr


def test_a_missing_file_ends_in_one_sentence_with_what_would_be_right():
    with pytest.raises(UserError, match=r"^--teacher missing.pt: no such file; .*DiT-XL-2-512x512.pt$"):
        checkpoints.load_teacher("missing.pt")


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


BROKEN = {
    "missing": (lambda s: without(s, "blocks.1.attn.proj.bias"), "missing: blocks.1.attn.proj.bias"),
    "another size": (
        lambda s: without(s, "") | {"blocks.3.x": torch.zeros(1)},
        "depth 4, width 32 .*: give it by --teacher-heads",
    ),
    "no DiT": (lambda s: {"weight": torch.zeros(3)}, "nor a DiT"),
    "half a DiT": (lambda s: without(s, "pos_embed"), "pos_embed"),
    "positions": (lambda s: s | {"pos_embed": torch.zeros(1, 10, 32)}, "10 positions"),
    "a tensor": (lambda s: torch.zeros(3), "holds a Tensor"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_named(case, state, tmp_path):
    damage, message = BROKEN[case]
    path = saved(tmp_path / "broken.pt", damage(state))
    with pytest.raises(UserError, match=message) as error:
        checkpoints.load_teacher(path)
    assert str(error.value).startswith(f"--teacher {path}: ") and "\n" not in str(error.value)


def test_unreadable_folders_are_refused(folder, tmp_path):
    cut = shutil.copytree(folder, tmp_path / "cut")
    file = cut / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match="not a readable checkpoint"):
        checkpoints.load_teacher(cut)
    file.unlink()
    with pytest.raises(UserError, match="is a folder without a DiT in diffusers' layout"):
        checkpoints.load_teacher(cut)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"norm_type": "ada_norm_single"}, "norm_type is 'ada_norm_single'"),
        ({"sample_size": 7}, "input size 7 is not divisible by patch size 2"),
        ({"num_layers": None}, "not the config of a DiTTransformer2DModel"),
        ({"num_layers": 4}, "missing: blocks.3"),
    ],
)
def test_other_models_of_diffusers_are_refused(change, message, folder, tmp_path):
    config = shutil.copytree(folder, tmp_path / "model") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(UserError, match=message):
        checkpoints.load_teacher(tmp_path / "model")


def test_blocks_with_embedders_of_their_own_are_refused(theirs, tmp_path):
    model = copy.deepcopy(theirs)
    model.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.bias.data += 1
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"transformer_blocks.1.norm1.emb.* is not that of the other blocks"):
        checkpoints.load_teacher(tmp_path)


#################################################################################
#                                 SiT and REPA                                  #
#################################################################################


@pytest.fixture(scope="module")
def flows():
    """The state dicts of the official codes' tiny models; four heads, which no known size has."""
    files = {name: arrays(GOLDEN / f"{name}_official.npz") for name in ("sit", "repa")}
    return {
        name: {key[2:]: torch.from_numpy(value) for key, value in file.items() if key.startswith("w/")}
        for name, file in files.items()
    }


def trained(state, **args):
    """A checkpoint of SiT's or REPA's training script."""
    return {"model": state, "ema": state, "opt": {}, "args": argparse.Namespace(**args)}


SIT = dict(model="SiT-XL/2", path_type="Linear", prediction="velocity", loss_weight=None)
REPA = dict(model="SiT-XL/2", path_type="linear", prediction="v", enc_type="dinov2-vit-b", encoder_depth=2)


@torch.no_grad()
def test_sits_and_repas_checkpoints_say_their_process(flows, tmp_path):
    for name, args in (("sit", SIT), ("repa", REPA)):
        path = saved(tmp_path / "0400000.pt", trained(flows[name], **args))
        model, config = checkpoints.load_teacher(path, heads=4)
        assert model.process == config["model"]["process"] == config["provenance"]["process"] == name
        golden = {key: torch.from_numpy(value) for key, value in arrays(GOLDEN / f"{name}_official.npz").items()}
        out = model(golden["x"], golden["t"], golden["y"])[:, :4]
        torch.testing.assert_close(out, golden["out/forward"], rtol=0, atol=1e-5)
        with pytest.raises(UserError, match=f"is of the process {name}, not of ddpm$"):
            checkpoints.load_teacher(path, heads=4, process="ddpm")
    for change, said in (
        ({"path_type": "GVP"}, "trained on the path GVP to predict velocity; give one of the linear path"),
        ({"prediction": "score"}, "trained on the path Linear to predict score"),
    ):
        with pytest.raises(UserError, match=said):
            checkpoints.load_teacher(saved(tmp_path / "other.pt", trained(flows["sit"], **SIT | change)), heads=4)


def test_repas_own_layers_are_dropped_and_renamed(flows, tmp_path):
    state = flows["repa"]
    old = {key.replace("blocks.2.", "decoder_blocks.0."): value for key, value in state.items()}
    assert any(key.startswith("projectors.") for key in state) and old.keys() != state.keys()
    hashes = set()
    for name, content in (("last.pt", state), ("SiT-XL-2-256x256.pt", old)):
        model, config = checkpoints.load_teacher(saved(tmp_path / name, content), heads=4)
        assert model.process == "repa" and torch.equal(model.state_dict()["pos_embed"], state["pos_embed"])
        assert torch.equal(model.state_dict()["blocks.2.attn.qkv.weight"], state["blocks.2.attn.qkv.weight"])
        hashes.add(config["provenance"]["teacher_hash"])
    assert len(hashes) == 1


def test_bare_weights_that_fit_several_processes_must_be_named(flows, state, tmp_path):
    bare = {key: value for key, value in flows["repa"].items() if not key.startswith("projectors.")}
    for content, choices in ((flows["sit"], r"ddpm \(a DiT\) or sit \(a SiT\)"), (bare, "ddpm, sit or repa")):
        path = saved(tmp_path / "weights.pt", content)
        with pytest.raises(UserError, match=f"what they were trained for, give --teacher-process: {choices}$"):
            checkpoints.load_teacher(path, heads=4)
        for process in ("ddpm", "sit"):
            model, config = checkpoints.load_teacher(path, heads=4, process=process)
            assert model.process == process and config["provenance"].get("process", "ddpm") == process
    for name, process in (("DiT-XL-2-256x256.pt", "ddpm"), ("SiT-XL-2-256x256.pt", "sit")):
        path = saved(tmp_path / name, state)
        assert checkpoints.load_teacher(path)[0].process == process
        with pytest.raises(UserError, match=f"is of the process {process}, not of repa$"):
            checkpoints.load_teacher(path, process="repa")


def test_a_lightningdit_is_called_by_its_name(state, tmp_path):
    theirs = without(state, "blocks.0.mlp.fc1.weight") | {"blocks.0.mlp.w12.weight": torch.zeros(1)}
    ddp = {f"module.{key}": value for key, value in theirs.items()}
    for content in (theirs, {"ema": ddp, "model": ddp, "opt": {}, "config": {"train": {"max_steps": 80000}}}):
        with pytest.raises(UserError, match="a LightningDiT, which this project cannot read: it has RMSNorm, SwiGLU"):
            checkpoints.load_teacher(saved(tmp_path / "lightningdit.pt", content))


def test_sits_official_name_is_found_in_the_cache_and_planned_before(state, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    sample = ("sample.py", "--teacher", "SiT-XL-2-256x256.pt", "--num-samples", 2, "--dry-run")
    call(*sample)
    plan = json.loads(capsys.readouterr().out)
    assert "would be fetched from https://www.dl.dropboxusercontent.com" in plan["not_checked"] and plan["flops"] > 1e12
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    saved(tmp_path / "hub/checkpoints/SiT-XL-2-256x256.pt", state)
    call(*sample)
    assert json.loads(capsys.readouterr().out)["process"] == "sit"


#################################################################################
#                             The authors' students                             #
#################################################################################


@pytest.fixture(scope="module")
def student(folder):
    """A student of four steps with heads that differ."""
    student = ARD.from_teacher(checkpoints.load_teacher(folder)[0], steps=4, mask="M4", history_layers=2).eval()
    for head in student.heads:
        torch.nn.init.normal_(head.linear.weight, std=0.1)
    return student


@pytest.fixture(scope="module")
def authors_state(student):
    """Its weights by the authors' names."""
    names = {f"heads.{k}.": f"final_layer{k + 1 if k else ''}." for k in range(4)}
    return {names.get(name[:8], name[:8]) + name[8:]: value for name, value in student.state_dict().items()}


@torch.no_grad()
def test_the_authors_student_is_read_with_what_its_options_add(student, authors_state, tmp_path):
    options = argparse.Namespace(model="DiT-Nano/2")
    path = saved(tmp_path / "0300000.pt", {"model": authors_state, "ema": authors_state, "opt": {}, "args": options})
    loaded, config = checkpoints.load_student(path, given={"history_layers": 2})
    assert config["model"] == student.config and config["vae"] == "stabilityai/sd-vae-ft-ema"
    x, _, y = inputs()
    torch.testing.assert_close(loaded.sample(x, y), student.sample(x, y), rtol=0, atol=1e-6)
    other, _ = checkpoints.load_student(path, given={"history_layers": 1, "mask": "M2", "steps": 4})
    assert (other.mask, other.history_layers) == ("M2", 1)
    for given, message in (
        ({"steps": 2, "history_layers": 2}, "steps is 4 there and 2 here"),
        ({}, "history layers 6 must be between 0 and the model's depth 3"),  # the paper's six, in a model of three
    ):
        with pytest.raises(UserError, match=message):
            checkpoints.load_student(path, given=given)
    for said, broken in (
        ("unexpected: level_embed", authors_state | {"level_embed": torch.zeros(4)}),
        ("missing: heads.2.linear.bias", without(authors_state, "final_layer3.linear.bias")),
    ):
        with pytest.raises(UserError, match=said):
            checkpoints.load_student(saved(path, broken), given={"history_layers": 2})
    with pytest.raises(UserError, match="unexpected: final_layer2"):  # a student is no teacher
        checkpoints.load_teacher(saved(path, authors_state))


def test_the_authors_student_is_sampled_by_the_authors_command(authors_state, tmp_path, capsys):
    state = dict(authors_state)
    path = saved(tmp_path / "0300000.pt", state)
    call("sample_ARD.py", f"--ckpt_path={path}", "--stack=2", "--mask=M3", "--num-samples=3", "--dry-run")
    plan = json.loads(capsys.readouterr().out)
    assert plan["student"]["mask"] == "M3" and plan["student"]["steps"] == 4 and plan["count"] == 3


WRAPPED = {
    "DDP": lambda s: {"ema": {f"module.{k}": v for k, v in s.items()}},
    "compiled": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "compiled in DDP": lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
    "compiled by blocks": lambda s: {k.replace("blocks.1.", "blocks.1._orig_mod."): v for k, v in s.items()},
    "FSDP": lambda s: {f"_fsdp_wrapped_module.{k.replace('attn.', 'attn._checkpoint_wrapped_module.')}": v
                       for k, v in s.items()},
    "a state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "Lightning": lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}, "global_step": 7,
                            "pytorch-lightning_version": "2.4.0", "hyper_parameters": {"lr": 1e-4}},
    "a trainer within a trainer": lambda s: {"model_state_dict": {f"net.dit.{k}": v for k, v in s.items()}},
    "DeepSpeed": lambda s: {"module": s},
}  # fmt: skip


@pytest.mark.parametrize("case", WRAPPED)
def test_what_wraps_a_state_dict_is_taken_off(case, state, folder, tmp_path):
    path = saved(tmp_path / "wrapped.ckpt", WRAPPED[case](state))
    model, config = checkpoints.load_teacher(path, process="ddpm")
    assert config["provenance"]["teacher_hash"] == checkpoints.load_teacher(folder)[1]["provenance"]["teacher_hash"]
    assert torch.equal(model.state_dict()["blocks.1.attn.qkv.weight"], state["blocks.1.attn.qkv.weight"])


def test_several_models_in_a_file_are_named_with_the_way_out(state, tmp_path):
    both = {f"{part}.{k}": v for part in ("net", "average") for k, v in state.items()}
    beside = {f"net.{k}": v for k, v in state.items()} | {"loss.scale": torch.ones(1)}
    for content, words in ((both, "under average. and under net. and"), (beside, r"other weights \(loss.scale\)")):
        path = saved(tmp_path / "several.ckpt", {"state_dict": content})
        with pytest.raises(UserError, match=rf"{words}.*save one model's alone: .*name.startswith\('"):
            checkpoints.load_teacher(path)


@pytest.mark.parametrize(
    "typed, said",
    [
        ("assets/digits_teacher.ckpt", "no such file"),
        ("assetts/digits_teacher.CKPT", "no such file"),
        ("assets/digits-teacher", "no such file"),
        ("../digits_teacher", "no such file"),
        ("gone/student", "gone is a link to /nowhere/at/all, which is not there"),
        ("circle/student", "circle is a link that leads back to itself"),
        ("gone.pt", "gone.pt is a link to /nowhere/at/all, which is not there"),
    ],
)
def test_a_misspelt_path_is_no_hub_id(typed, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "assets").mkdir()
    for name in ("gone", "gone.pt"):
        (tmp_path / name).symlink_to("/nowhere/at/all")
    (tmp_path / "circle").symlink_to("circle")
    monkeypatch.chdir(tmp_path)
    dump = ("--out", "store", "--num-trajectories", 1, "--dry-run")
    error = refused(capsys, "sample_trajectory.py", "--teacher", typed, *dump)
    assert f"--teacher {typed}: {said}; give a checkpoint" in error
    assert not (tmp_path / "store").exists()
