"""Samples go to other tools under their prompts' names, and CLIP's score is what open_clip's embeddings give."""

import json

import numpy as np
import open_clip
import pytest
import torch
from helpers import call, refused, write_images
from PIL import Image

from evaluations.prompts import compbench_name
from stores.captions import CaptionStore

CAPTIONS = ["a three above a seven", "a seven", "a nine beside a one"]


@pytest.fixture
def samples(tmp_path):
    """Seven samples of three captions, with the store of these."""
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS) + "\n")
    call("encode_captions.py", "--text", tmp_path / "captions.txt", "--encoder", "words", "--out", tmp_path / "store")
    about = {f"sample_{name}": value for name, value in CaptionStore(tmp_path / "store").about.items()}
    images = np.random.default_rng(0).integers(256, size=(7, 32, 32, 3), dtype=np.uint8)
    members = {"arr_1": np.arange(7) % 3, "provenance": np.array(json.dumps(about))}
    return write_images(tmp_path / "samples.npz", images, **members), tmp_path / "store", images


def test_compbench_finds_prompt_and_order_in_the_names(samples, tmp_path):
    file, store, images = samples
    call("evaluations.prompts", "compbench", file, "--captions", store, "--out", tmp_path / "out")
    names = sorted((path.name for path in (tmp_path / "out").iterdir()), key=lambda n: int(n.split("_")[-1][:-4]))
    assert [name.split("_")[0] for name in names] == [CAPTIONS[i % 3] for i in range(7)]
    for name, image in zip(names, images, strict=True):
        assert (np.array(Image.open(tmp_path / "out" / name)) == image).all()
    assert compbench_name("either/or_both\n", 3) == "either or both_000003.png"
    assert compbench_name("___", 0) == "image_000000.png"
    long = compbench_name("\N{SNOWMAN} " * 400, 123456)
    assert len(long.encode()) < 255 and long.endswith("_123456.png")


def test_geneval_finds_a_folder_for_each_prompt(samples, tmp_path, capsys):
    file, store, images = samples
    (tmp_path / "meta.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in CAPTIONS))
    command = ("evaluations.prompts", "geneval", file, "--captions", store, "--out", tmp_path / "out", "--metadata")
    call(*command, tmp_path / "meta.jsonl")
    assert json.loads((tmp_path / "out/00001/metadata.jsonl").read_text()) == {"prompt": CAPTIONS[1]}
    assert [path.name for path in sorted((tmp_path / "out/00000/samples").iterdir())] == [
        "0000.png", "0001.png", "0002.png",
    ]  # fmt: skip
    assert (np.array(Image.open(tmp_path / "out/00000/samples/0002.png")) == images[6]).all()
    (tmp_path / "meta.jsonl").write_text("{}\n")
    assert "1 lines for 3 captions" in refused(capsys, *command, tmp_path / "meta.jsonl")


def test_the_clip_score_is_the_mean_cosine(samples, tmp_path, capsys):
    file, store, images = samples
    vision, text = (
        dict(image_size=32, layers=1, width=16, patch_size=8, head_width=8),
        dict(width=16, heads=2, layers=1),
    )
    (tmp_path / "tiny-clip.json").write_text(json.dumps(dict(embed_dim=8, vision_cfg=vision, text_cfg=text)))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms("tiny-clip")
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    command = ("evaluations.prompts", "clip", file, "--captions", store, "--clip-model", "tiny-clip", "--device", "cpu")
    call(*command, "--clip-weights", tmp_path / "clip.pt", "--json", tmp_path / "score.json")
    found = json.loads((tmp_path / "score.json").read_text())
    with torch.no_grad():
        model.eval()
        a = model.encode_image(torch.stack([preprocess(Image.fromarray(image)) for image in images]))
        b = model.encode_text(open_clip.get_tokenizer("tiny-clip")([CAPTIONS[i % 3] for i in range(7)]))
    wanted = 100 * torch.cosine_similarity(a, b).clamp(min=0).mean().item()
    assert found["clip_score"] == pytest.approx(wanted, rel=1e-4) and found["count"] == 7
    assert f"of 7 samples: {wanted:.3g}" in capsys.readouterr().out
    assert "cannot load them" in refused(capsys, *command, "--clip-weights", tmp_path / "absent.pt")


def test_samples_of_other_captions_are_refused(samples, tmp_path, capsys):
    file, store, images = samples
    command = ("evaluations.prompts", "compbench", file, "--out", tmp_path / "out")
    assert "--captions: give the captions" in refused(capsys, *command)
    (tmp_path / "captions.txt").write_text("a one\na two\na three\n")
    call("encode_captions.py", "--text", tmp_path / "captions.txt", "--encoder", "words", "--out", tmp_path / "other")
    assert "text_sha256 is" in refused(capsys, *command, "--captions", tmp_path / "other")
    write_images(tmp_path / "bare.npz", images)
    bare = ("evaluations.prompts", "compbench", tmp_path / "bare.npz", "--captions", store, "--out", tmp_path / "out")
    assert "was not drawn from captions" in refused(capsys, *bare)
    assert not (tmp_path / "out").exists()
