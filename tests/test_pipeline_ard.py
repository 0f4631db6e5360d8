"""The pipeline of diffusers: the samples of sample_ARD.py to the bit, saved and loaded without pickle.

Samples before and after saving; forms of input and output, names of classes, given predictions;
half precision; what is refused; the command that makes a folder, loaded in another process.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import ROOT, arrays, call, random_teacher, refused, save_student
from PIL import Image
from safetensors.torch import load_file, save_file
from text_helpers import random_text_teacher, save_t5

from models_ard import ARD
from pipeline_ard import ARDPipeline
from stores import checkpoints
from stores.captions import CaptionStore


def quiet(pipe: ARDPipeline) -> ARDPipeline:
    """Without the progress bar that diffusers shows by default."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def latent_student(tmp_path_factory, autoencoder):
    """An untrained student of three classes on the tiny autoencoder's latents."""
    student = ARD.from_teacher(random_teacher(input_size=4, in_channels=4, num_classes=3), history_layers=2)
    return save_student(tmp_path_factory.mktemp("latent") / "student.pt", student, autoencoder)


CAPTIONS = ["a three", "an eight beside a two", "a one above a four"]


def save_text_student(folder: Path, encoder: str | Path, channels: int) -> tuple[Path, Path]:
    """A store of these captions, and an untrained student of three steps that knows their encoder."""
    (folder / "captions.txt").write_text("".join(f"{caption}\n" for caption in CAPTIONS))
    call("encode_captions.py", "--text", folder / "captions.txt", "--encoder", encoder, "--out", folder / "captions",
         "--device", "cpu")  # fmt: skip
    teacher = random_text_teacher(std=0.05, in_channels=1, caption_channels=channels)
    path = save_student(folder / "student.pt", ARD.from_teacher(teacher, steps=3, history_layers=1))
    content = checkpoints.load(path, "")
    content["config"]["provenance"] |= CaptionStore(folder / "captions").about
    checkpoints.save(path, content)
    return path, folder / "captions"


@pytest.fixture(scope="module")
def text_student(tmp_path_factory) -> tuple[Path, Path]:
    """One that reads the demo's words, and the captions."""
    return save_text_student(tmp_path_factory.mktemp("words"), "words", 64)


def words_of(path: Path, captions: Path | None, out: Path, count: int) -> tuple[dict, dict]:
    """Samples of sample_ARD.py, and the pipeline's arguments for the same: all but their noise."""
    reads = ("--captions", captions) if captions else ()
    call("sample_ARD.py", "--ckpt-path", path, "--num-samples", count, "--seed", 5, "--save-latents", "--device", "cpu",
         *reads, "--out", out)  # fmt: skip
    wanted = arrays(out)
    labels = wanted["arr_1"].tolist()
    return wanted, {"prompt": [CAPTIONS[i] for i in labels]} if captions else {"class_labels": labels}


@pytest.mark.parametrize("kind", ["pixels", "latents", "text"])
def test_the_pipeline_draws_sample_ards_samples_to_the_bit_before_and_after_saving(
    kind, student_file, latent_student, text_student, tmp_path
):
    path, captions = {"pixels": (student_file, None), "latents": (latent_student, None), "text": text_student}[kind]
    wanted, asked = words_of(path, captions, tmp_path / "s.npz", 20)
    fresh = quiet(ARDPipeline.from_checkpoint(path))
    fresh.save_pretrained(tmp_path / "saved")
    for pipe in (fresh, quiet(ARDPipeline.from_pretrained(tmp_path / "saved"))):
        given = dict(**asked, latents=pipe.noise(5, range(20)))
        assert np.array_equal(pipe(**given, output_type="latent").images.numpy(), wanted["latents"])
        images = pipe(**given).images
        assert all(image.mode == {"pixels": "L", "latents": "RGB", "text": "L"}[kind] for image in images)
        assert np.array_equal(np.stack([np.asarray(image.convert("RGB")) for image in images]), wanted["arr_0"])
    files = [file.name for file in (tmp_path / "saved").rglob("*") if file.is_file()]
    assert (tmp_path / "saved/vae").exists() is (kind == "latents")
    assert {name.rpartition(".")[2] for name in files} == {"json", "safetensors", "md", "py"}
    again = ("--num-samples", 20, "--seed", 5, "--save-latents", "--device", "cpu", "--out", tmp_path / "again.npz")
    again += ("--captions", captions) if captions else ()
    call("sample_ARD.py", "--ckpt-path", tmp_path / "saved", *again)  # the folder serves as the checkpoint does
    found = arrays(tmp_path / "again.npz")
    assert all(np.array_equal(found[name], wanted[name]) for name in ("arr_0", "arr_1", "latents"))


ELSEWHERE = """
import json
import sys
import numpy as np
import torch
from diffusers import DiffusionPipeline

folder, given, asked = sys.argv[1:]
asked = json.loads(asked)
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
wanted = np.load(given)
latents = pipe(**asked, latents=pipe.noise(5, range(6)), output_type="latent").images
assert np.array_equal(latents.numpy(), wanted["latents"])
images = pipe(**asked, latents=pipe.noise(5, range(6))).images
assert np.array_equal(np.stack([np.asarray(image.convert("RGB")) for image in images]), wanted["arr_0"])
pipe.save_pretrained(folder + "-again")
assert not any(name in sys.modules for name in ("models_ard", "runtime", "stores")), "took this repository's code"
"""


@pytest.mark.parametrize("kind", ["pixels", "latents", "text"])
def test_a_saved_pipeline_needs_no_clone(kind, student_file, latent_student, text_student, tmp_path):
    """From another folder, with a foreign models.py there, in a process that does not know this repository."""
    path, captions = {"pixels": (student_file, None), "latents": (latent_student, None), "text": text_student}[kind]
    asked = words_of(path, captions, tmp_path / "s.npz", 6)[1]
    call("pipeline_ard.py", path, "--out", tmp_path / "saved")
    for name in ("models.py", "models_ard.py", "runtime.py"):
        (tmp_path / name).write_text("raise ImportError('a foreign file')\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for folder in ("saved", "saved-again"):  # saved again without the repository, it is as whole as before
        ran = subprocess.run(
            [sys.executable, "-c", ELSEWHERE, str(tmp_path / folder), str(tmp_path / "s.npz"), json.dumps(asked)],
            cwd=tmp_path,
            env=environment | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
    refusal = "Pass `trust_remote_code=True`"
    with pytest.raises(ValueError, match=refusal):
        DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert type(ARDPipeline.from_pretrained(tmp_path / "saved")) is ARDPipeline  # runs none of the folder's code


def test_a_prompt_is_read_by_the_encoder_of_the_captions_or_comes_as_tokens(text_student, tmp_path):
    path, captions = text_student
    pipe = quiet(ARDPipeline.from_checkpoint(path))
    noise = pipe.noise(0, [0, 1])
    wanted = pipe(prompt=CAPTIONS[:2], latents=noise, output_type="latent").images
    store = CaptionStore(captions)(torch.tensor([0, 1]))
    assert torch.equal(pipe(prompt_embeds=store, latents=noise, output_type="latent").images, wanted)
    one = pipe("An eight beside a two", latents=noise[1:], output_type="latent").images  # the first argument
    assert (one - wanted[1:]).abs().max() < 1e-5 < (wanted[:1] - wanted[1:]).abs().max()
    card = pipe.model_card()
    assert "pipeline_tag: text-to-image" in card and "| text encoder | `words`, 16 tokens at most |" in card
    for wrong, expected in (
        (dict(), "give prompt, or else prompt_embeds"),
        (dict(batch_size=2), "and nothing else"),
        (dict(prompt="a cat"), "text encoder words: does not know 'cat' in the caption 'a cat'"),
        (dict(prompt_embeds=store[..., :12]), r"\(2, 6, 12\): must be \(B, L, 64\)"),
    ):
        with pytest.raises(ValueError, match=expected):
            pipe(**wrong)


def test_t5_is_found_by_its_name_and_known_by_its_hash(tmp_path):
    t5 = save_t5(tmp_path / "t5")
    path, captions = save_text_student(tmp_path, t5, 12)
    wanted, asked = words_of(path, captions, tmp_path / "s.npz", 3)
    call("pipeline_ard.py", path, "--out", tmp_path / "saved", "--encoder", "me/t5")
    pipe = quiet(ARDPipeline.from_pretrained(tmp_path / "saved"))
    assert "| text encoder | `me/t5`" in (tmp_path / "saved/README.md").read_text()
    pipe.load_text_encoder(t5)
    found = pipe(**asked, latents=pipe.noise(5, range(3)), output_type="latent").images.numpy()
    assert np.abs(found - wanted["latents"]).max() < 1e-5 * np.abs(wanted["latents"]).max()
    torch.manual_seed(1)
    other = save_t5(tmp_path / "other", scale=2.0)
    with pytest.raises(
        ValueError, match="in bf16 it is not the one that the model's captions were read by, whose hash"
    ):
        pipe.load_text_encoder(other)
    with pytest.raises(ValueError, match=r"text encoder absent: no such folder.*; or give prompt_embeds"):
        pipe.load_text_encoder("absent")


def test_files_of_a_pipeline_follow_the_umask(student_file, tmp_path):
    before = os.umask(0o022)
    try:
        call("pipeline_ard.py", student_file, "--out", tmp_path / "saved")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "saved").rglob("*") if file.is_file()} == {0o644}


def test_half_precision_halves_the_weights(student_file, tmp_path):
    for precision in ("fp32", "bf16"):
        call("pipeline_ard.py", student_file, "--out", tmp_path / precision, "--precision", precision)
    sizes = [next((tmp_path / name).rglob("*.safetensors")).stat().st_size for name in ("fp32", "bf16")]
    assert 1.8 < sizes[0] / sizes[1] < 2.2
    ours, theirs = (quiet(ARDPipeline.from_pretrained(tmp_path / name)) for name in ("fp32", "bf16"))
    given = dict(class_labels=[3], latents=ours.noise(0, [0]), output_type="latent")
    assert 0 < (ours(**given).images - theirs(**given).images).abs().max() < 0.1


def test_classes_are_taken_by_number_and_by_name(student_file, tmp_path):
    (tmp_path / "names.txt").write_text("".join(f"{i}_food\n" for i in range(10)))
    pipe = quiet(ARDPipeline.from_checkpoint(student_file, labels=tmp_path / "names.txt"))

    def draw(*labels) -> np.ndarray:
        return pipe(*labels, generator=torch.Generator().manual_seed(0), output_type="np", num_inference_steps=4).images

    assert np.array_equal(draw("3_food"), draw([3])) and np.array_equal(draw(3), draw([3]))
    assert np.array_equal(draw(["3_food", 7]), draw([3, 7])) and not np.array_equal(draw("4_food"), draw([3]))
    with pytest.raises(ValueError, match="5_drink: no such label, choose among 0_food, 1_food"):
        draw("5_drink")


@pytest.fixture(scope="module")
def digits(student_file) -> ARDPipeline:
    """The pipeline of the small digits student."""
    return quiet(ARDPipeline.from_checkpoint(student_file))


def test_outputs_have_the_forms_of_diffusers(digits):
    one, other = (torch.Generator().manual_seed(seed) for seed in (1, 1))
    arrays_ = digits(class_labels=[3, 7], generator=one, output_type="np").images
    tensors = digits(class_labels=[3, 7], generator=other, output_type="pt", return_dict=False)[0]
    assert arrays_.shape == (2, 8, 8, 1) and tensors.shape == (2, 1, 8, 8)
    assert np.array_equal(arrays_, tensors.permute(0, 2, 3, 1).numpy()) and 0 <= arrays_.min() < arrays_.max() <= 1
    same = digits(class_labels=[3, 7], generator=torch.Generator().manual_seed(1)).images
    assert np.abs(np.asarray(same[0]) / 255 - arrays_[0, ..., 0]).max() <= 0.5 / 255 + 1e-6
    assert torch.equal(digits.noise(0, [4, 9])[1], digits.noise(0, range(10))[9])


def test_labels_are_known_by_name(student_file, tmp_path):
    content = checkpoints.load(student_file, "")
    content["config"]["provenance"]["class_names"] = ["zero, nought", *"123456789"]
    checkpoints.save(tmp_path / "named.pt", content)
    ARDPipeline.from_checkpoint(tmp_path / "named.pt").save_pretrained(tmp_path / "saved")
    pipe = ARDPipeline.from_pretrained(tmp_path / "saved")
    assert pipe.get_label_ids(["nought", "7", "zero"]) == [0, 7, 0] and pipe.get_label_ids("9") == [9]
    with pytest.raises(ValueError, match="^ten: no such label, choose among 1, 2, .*, zero$"):
        pipe.get_label_ids(["1", "ten"])


@pytest.mark.parametrize("name, text", [
    ("names.txt", "zero\none\ntwo\n3\n4\n5\n6\n7\n8\n9, niner\n"),
    ("model_index.json", json.dumps({"_class_name": "DiTPipeline", "id2label": dict(zip(
        "9876543210", ["9, niner", *"876543", "two", "one", "zero"]))})),
])  # fmt: skip
def test_names_are_taken_from_a_file(name, text, student_file, tmp_path):
    (tmp_path / name).write_text(text)
    call("pipeline_ard.py", student_file, "--out", tmp_path / "out", "--labels", tmp_path / name)
    pipe = ARDPipeline.from_pretrained(tmp_path / "out")
    assert pipe.get_label_ids(["two", "niner", "3"]) == [2, 9, 3]


def test_the_callback_sees_each_prediction_and_given_ones_are_taken(digits):
    seen = []
    noise = digits.noise(0, [0])
    sample = digits(class_labels=[3], latents=noise, output_type="latent",
                    callback_on_step_end=lambda pipe, step, time, about: seen.append((step, float(time), about)),
                    )  # fmt: skip
    with torch.no_grad():
        wanted = digits.transformer.student.sample(noise, torch.tensor([3]))
    assert [(step, time) for step, time, _ in seen] == [(0, 999), (1, 749.25), (2, 499.5), (3, 249.75)]
    assert torch.equal(torch.stack([about["latents"] for *_, about in seen], dim=1), wanted)
    again = digits(class_labels=[3], latents=torch.zeros_like(noise), output_type="latent", given={3: sample.images})
    assert torch.equal(again.images, sample.images)


def test_an_unconditional_student_is_told_how_many(tmp_path):
    student = ARD.from_teacher(random_teacher(num_classes=0), steps=2, history_layers=1)
    path = save_student(tmp_path / "student.pt", student)
    pipe = quiet(ARDPipeline.from_checkpoint(path))
    assert pipe.labels == {} and len(pipe(batch_size=3).images) == 3 and len(pipe().images) == 1
    with pytest.raises(ValueError, match="batch_size to an unconditional one"):
        pipe(class_labels=[0])


@pytest.mark.parametrize(
    "wrong, expected",
    [
        (dict(), "give class_labels"),
        (dict(prompt="a three"), "give prompt or prompt_embeds to a student that reads text"),
        (dict(class_labels=[10]), r"class_labels \[10\]: this student has the labels 0..9"),
        (dict(class_labels=[1], num_inference_steps=25), "num_inference_steps 25: this student has 4 steps"),
        (dict(class_labels=[1], output_type="jpg"), "'jpg' is none of"),
        (dict(class_labels=[1], latents=torch.zeros(2, 1, 8, 8)), r"need \(1, 1, 8, 8\)"),
    ],
)
def test_wrong_calls_are_refused(wrong, expected, digits):
    with pytest.raises(ValueError, match=expected):
        digits(**wrong)


def test_half_precision_keeps_the_times_of_steps(digits, tmp_path):
    digits.save_pretrained(tmp_path)
    call_ = dict(class_labels=[1, 2], latents=digits.noise(0, [0, 1]), output_type="pt")
    full = digits(**call_).images
    loaded, cast = (
        ARDPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16),
        ARDPipeline.from_pretrained(tmp_path),
    )
    for pipe in (loaded, cast.to(torch.bfloat16)):
        assert pipe.transformer.dtype == torch.bfloat16
        assert torch.equal(pipe.transformer.student.times, digits.transformer.student.times)
        half = quiet(pipe)(**call_).images
        assert half.dtype == torch.float32 and 0 < (half - full).abs().max() < 0.1


def test_weights_that_do_not_fit_and_pickles_are_refused(digits, tmp_path):
    digits.save_pretrained(tmp_path, safe_serialization=False)
    file = tmp_path / "transformer/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    save_file(dict(list(state.items())[1:]), file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the weights do not fit the model .*missing_keys"):
        ARDPipeline.from_pretrained(tmp_path)
    file.unlink()
    torch.save(state, file.with_name("diffusion_pytorch_model.bin"))
    with pytest.raises(OSError, match="safetensors"):
        ARDPipeline.from_pretrained(tmp_path, use_safetensors=False)


def test_push_to_hub_uploads_what_save_pretrained_writes(digits, tmp_path, monkeypatch):
    """The calls that need a network are the hub's own; here they note what they are given."""
    from diffusers.utils import hub_utils
    from huggingface_hub import RepoUrl

    uploaded = {}

    def upload(repo_id, folder_path, **_):
        files = [path for path in Path(folder_path).rglob("*") if path.is_file()]
        uploaded.update({str(path.relative_to(folder_path)): path.read_bytes() for path in files})

    monkeypatch.setattr(hub_utils, "create_repo", lambda repo_id, **_: RepoUrl(f"https://huggingface.co/{repo_id}"))
    monkeypatch.setattr(hub_utils, "upload_folder", upload)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    digits.push_to_hub("me/digits")
    digits.save_pretrained(tmp_path)
    assert uploaded == {str(f.relative_to(tmp_path)): f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    card = uploaded["README.md"].decode()
    assert card.startswith("---\nlibrary_name: diffusers\n") and card.count("---\n") == 2
    for row in ("| steps S | 4 |", "| mask | M4 |", "| layers that see history N | 2 of 3 |", "| target | x0 |",
                "guidance 1.5", "loss R", "training steps | 3 |"):  # fmt: skip
        assert row in card, row


def test_mistakes_of_the_command_are_named(student_file, teacher_file, tmp_path, capsys):
    out = ("--out", tmp_path / "out")
    assert "holds a teacher" in refused(capsys, "pipeline_ard.py", teacher_file, *out)
    assert "works on pixels" in refused(capsys, "pipeline_ard.py", student_file, *out, "--vae", "ema")
    encoder = refused(capsys, "pipeline_ard.py", student_file, *out, "--encoder", "words")
    assert "--encoder words: this student was trained on no captions" in encoder
    (tmp_path / "half").mkdir()
    (tmp_path / "half/model_index.json").write_text('{"_class_name": "ARDPipeline"}')
    assert "not a whole pipeline" in refused(capsys, "sample_ARD.py", "--ckpt-path", tmp_path / "half")
    shutil.rmtree(tmp_path / "half")
    assert "it exists already" in refused(capsys, "pipeline_ard.py", student_file, "--out", tmp_path)
    assert not list(tmp_path.iterdir())
    (few, wrong) = (tmp_path / "few.txt", tmp_path / "wrong.json")
    few.write_text("a\nb\n")
    wrong.write_text('{"id2label": {"1": "a"}}')
    assert "has 2 names, the model 10 classes" in refused(
        capsys, "pipeline_ard.py", student_file, *out, "--labels", few
    )
    assert "has no id2label" in refused(capsys, "pipeline_ard.py", student_file, *out, "--labels", wrong)
    assert set(tmp_path.iterdir()) == {few, wrong}


@pytest.mark.slow
def test_a_folder_of_the_command_loads_in_another_process_as_its_card_says(student_file, tmp_path):
    command = [sys.executable, ROOT / "pipeline_ard.py", student_file, "--out", tmp_path / "digits"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and "digits: 0." in done.stdout, done.stderr
    assert json.loads((tmp_path / "digits/model_index.json").read_text())["transformer"][0] == "pipeline_ard"
    code = (tmp_path / "digits/README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace("FOLDER OR HUB ID", "digits") + "images[1].save('one.png')\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300,
                          env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    pipe = quiet(ARDPipeline.from_checkpoint(student_file))
    wanted = pipe(class_labels=[0, 1], generator=torch.Generator().manual_seed(0)).images[1]
    assert Image.open(tmp_path / "one.png").tobytes() == wanted.tobytes()
