"""Paths at which nothing is: misspelt ones are told from hub ids, and broken links are named."""

import pytest
from helpers import NANO_TEACHER, SMALL, call, refused
from PIL import Image

from runtime.paths import is_hub_id

IDS = (
    *("facebook/DiT-XL-2-256", "stabilityai/sd-vae-ft-ema", "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers"),
    "a/b.c_1",
)
PATHS = (
    *("x", "./vae", "../vae", "a/b/c", "weights/", "/weights", "-a/b", "a-/b", "a/b.", "a--b/c", "a/b..c", "a/b.ckpt"),
    *("a/b.SAFETENSORS", "a/b.pth", "a b/c", "~/vae", "é/vae"),
)


def test_hub_ids_are_told_from_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [text for text in (*IDS, *PATHS) if is_hub_id(text)] == list(IDS)
    (tmp_path / "facebook").mkdir()
    (tmp_path / "stabilityai").symlink_to("nowhere")
    assert [text for text in IDS if is_hub_id(text)] == list(IDS[2:])


@pytest.mark.parametrize("typed, said", [("weights/vae", "no such folder"), ("gone/vae", "gone is a link to /no/wh")])
def test_a_misspelt_autoencoder_is_refused_before_it_is_fetched(typed, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "weights").mkdir()
    (tmp_path / "gone").symlink_to("/no/where")
    (tmp_path / "images/class").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(tmp_path / "images/class/a.png")
    monkeypatch.chdir(tmp_path)
    encode = ("--data-path", "images", "--image-size", 16, "--out", "store", "--dry-run", "--vae")
    assert f"--vae {typed}: {said}" in refused(capsys, "encode_latents.py", *encode, typed)
    call("encode_latents.py", *encode, "ema")  # by its short name, whatever lies here


LINKS = {
    "dangling": ("/scratch/unmounted", "is a link to /scratch/unmounted, which is not there"),
    "circle": ("circle", "is a link that leads back to itself"),
}
WRITE = {
    "results": ("train_ARD.py", *SMALL, "--data-path", "STORE", "--results-dir", "LINK"),
    "a folder in them": ("train_ARD.py", *SMALL, "--data-path", "STORE", "--results-dir", "LINK/mine"),
    "a run": ("train_ARD.py", *SMALL, "--data-path", "STORE", "--run-dir", "LINK"),
    "a teacher's run": ("train.py", *NANO_TEACHER, "--data-path", "digits", "--run-dir", "LINK/run"),
    "a store": ("sample_trajectory.py", "--teacher", "TEACHER", "--num-trajectories", 3, "--out", "LINK"),
    "samples": ("sample.py", "--teacher", "TEACHER", "--num-samples", 3, "--out", "LINK/s.npz"),
    "a report": ("evaluations.evaluator", "REFERENCE", "SAMPLES", "--features", "digits", "--json", "LINK/m.json"),
}
READ = {
    "--data-path": ("train_ARD.py", *SMALL, "--run-dir", "run", "--data-path", "LINK"),
    "--teacher": ("sample.py", "--num-samples", 3, "--out", "s.npz", "--teacher", "LINK"),
    "--ckpt-path": ("sample_ARD.py", "--num-samples", 3, "--out", "s.npz", "--ckpt-path", "LINK/student.pt"),
    "images": ("train.py", *NANO_TEACHER, "--image-size", 8, "--run-dir", "run", "--data-path", "LINK/train"),
}


@pytest.mark.parametrize("kind", LINKS)
@pytest.mark.parametrize("case", [*WRITE, *READ])
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "plan"])
def test_a_link_that_leads_nowhere_is_named(case, kind, dry, store, teacher_file, digit_files, tmp_path, monkeypatch,
                                            capsys):  # fmt: skip
    target, said = LINKS[kind]
    (tmp_path / kind).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    names = {"STORE": store, "TEACHER": teacher_file, "REFERENCE": digit_files[0], "SAMPLES": digit_files[1]}
    names["LINK"] = kind
    words = [str(word) for word in (WRITE | READ)[case]]
    for name, value in names.items():
        words = [word.replace(name, str(value)) for word in words]
    assert f"{kind} {said}" in refused(capsys, *words, *(dry if "evaluator" not in words[0] else []))
    assert [path.name for path in tmp_path.iterdir()] == [kind]


@pytest.mark.parametrize("there", [True, False], ids=["whole", "to be made"])
def test_samples_are_written_to_the_target_of_a_link(there, teacher_file, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "s.npz").symlink_to(disk / "real.npz")
    draw = ("sample.py", "--teacher", teacher_file, "--num-samples", 3, "--solver-steps", 4, "--out", "s.npz")
    draw = (*draw[:-1], tmp_path / "s.npz")
    call(*draw)
    if there:
        call(*draw)  # it is there already
        assert "already there" in capsys.readouterr().out
    assert (tmp_path / "s.npz").is_symlink() and (disk / "real.npz").is_file() and not (disk / "real.npz").is_symlink()
    (tmp_path / "t.npz").symlink_to(tmp_path / "gone/real.npz")
    said = f"--out {tmp_path}/t.npz: {tmp_path}/t.npz is a link to {tmp_path}/gone/real.npz, which is not there"
    assert said in refused(capsys, *draw[:-1], tmp_path / "t.npz")
    (tmp_path / "u.npz").symlink_to("u.npz")
    assert "u.npz is a link that leads back to itself" in refused(capsys, *draw[:-1], tmp_path / "u.npz")


def test_links_that_lead_somewhere_are_followed(store, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "results").symlink_to("disk")
    call("train_ARD.py", *SMALL, "--data-path", store, "--iterations", 1, "--results-dir", tmp_path / "results")
    assert (tmp_path / "results").is_symlink() and (tmp_path / "disk/000-DiT-Nano-2/checkpoints/0000001.pt").is_file()
