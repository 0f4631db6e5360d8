"""The page draws the samplers' images, and a real browser shows it."""

import contextlib
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
from helpers import SMALL, call, random_teacher, refused, save_student, start

import app
from app import Comparison, picture
from diffusion.teacher_ode import TeacherODE
from models_ard import ARD
from runtime.randomness import noise
from stores import checkpoints
from stores.digits import digits_images


def free_port() -> int:
    """A port that nothing listens at."""
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]


@pytest.fixture(scope="module")
def step_file(store, tmp_path_factory) -> Path:
    """A student of the same teacher by step distillation, in two steps."""
    folder = tmp_path_factory.mktemp("step") / "run"
    call("train_ARD.py", "--data-path", store, *SMALL, "--mask", "M1", "--steps", 2, "--iterations", 1, "--run-dir",
         folder)  # fmt: skip
    return folder / "checkpoints/0000001.pt"


@pytest.fixture(scope="module")
def models(student_file, step_file) -> Comparison:
    """The small student beside its teacher and the other student."""
    options = app.build_parser().parse_args(["--device", "cpu"])
    return app.open_models(student_file, step_file, options)[0]


@torch.no_grad()
def test_both_pictures_are_of_the_same_noise_and_labels(models):
    z, y, names = noise(4, "sample", [2, 7], (1, 8, 8)), torch.tensor([2, 7]), ["2", "7"]
    teacher, teacher_time, on_the_way, student_time = models.draw([2, 7], 4)
    assert teacher.tobytes() == picture(models.ode.sample(z, y), names).tobytes()
    wanted = models.student.sample(z, y)
    wanted = [picture(wanted[:, k], names if k == 3 else ()) for k in range(4)]
    assert [image.tobytes() for image in on_the_way] == [image.tobytes() for image in wanted]
    assert min(teacher_time, student_time) > 0
    assert teacher.size == (2 * 168 + 8, 168 + 8 + 25)  # 20 times as large, a margin, a line of names
    assert picture(torch.zeros(7, 3, 256, 256)).size == (5 * 264 + 8, 2 * 264 + 8)  # two rows, as they are


@torch.no_grad()
def test_point_by_point_all_start_from_one_noise(models):
    z, y = noise(4, "sample", [7], (1, 8, 8)), torch.tensor([7])
    rows = models.on_the_way([7], 4)
    assert list(models.students) == ["ARD", "Step distillation"] and len(rows) == 3
    learned = TeacherODE(models.ode.teacher).complete({"noise": z, "y": y}, [6, 12, 19, 25], "x0")["trajectory"][0]
    for found, points in zip(rows, (learned, *(model.sample(z, y)[0] for model in models.students.values()))):
        points = points if points is learned else torch.cat([z, points])
        titles = ["noise", *(f"step {k}" for k in range(1, len(points)))]
        assert found.tobytes() == picture(points, titles, len(points)).tobytes()
    assert [row.width for row in rows] == [5 * 168 + 8] * 2 + [3 * 168 + 8]


@torch.no_grad()
def test_an_upload_takes_the_place_of_a_prediction(models):
    image = digits_images()[0][:1]
    upload = picture(image.float() / 127.5 - 1).crop((8, 8, 168, 168)).resize((8, 8), 0)
    source, edited = models.edit(upload, [1, 5], 0, 2)
    latents = image.float() / 127.5 - 1
    assert source.tobytes() == picture(latents).tobytes()
    given = {1: latents.expand(2, -1, -1, -1)}
    wanted = models.student.sample(noise(0, "sample", [1, 5], (1, 8, 8)), torch.tensor([1, 5]), given)
    assert edited.tobytes() == picture(wanted[:, -1], ["1", "5"]).tobytes()


def test_without_a_path_it_opens_on_the_shipped_student_or_the_demos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert app.default_students() == (None, None)
    demo = [Path(f"results/demo/{name}-x0/checkpoints/0000{step}00.pt") for name in ("ard", "step") for step in "56"]
    for path in demo:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert app.default_students() == (demo[1], demo[3])
    Path("assets").mkdir()
    shipped = [Path("assets/emoji_ard.pt"), Path("assets/emoji_step.pt")]
    shipped[0].touch()
    assert app.default_students() == (shipped[0], None)
    shipped[1].touch()
    assert app.default_students() == tuple(shipped)


def test_a_pipeline_is_opened_by_its_hub_id(student_file, tmp_path, monkeypatch, capsys):
    """From the hub's cache; where it is not in there and there is no network, a sentence says what to do."""
    repository, revision = tmp_path / "hub/models--me--digits", "0" * 40
    call("pipeline_ard.py", student_file, "--out", repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found, wanted = (checkpoints.load_student(path)[0].state_dict() for path in ("me/digits", student_file))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    absent = refused(capsys, "app.py", "--ckpt-path", "me/absent", "--port", free_port())
    assert "--ckpt-path me/absent: no such folder, and not to be had from the Hugging Face hub" in absent
    assert "hf download me/absent --local-dir FOLDER" in absent


def test_what_is_missing_is_named(student_file, tmp_path, monkeypatch, capsys):
    port = ("--port", free_port())
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gradio", None)
        assert "app.py needs gradio: pip install -r requirements-extra.txt" in refused(capsys, "app.py", *port)
    monkeypatch.setitem(sys.modules, "gradio", sys)  # is not reached
    monkeypatch.chdir(tmp_path)
    assert "run `make demo`, or give a student" in refused(capsys, "app.py", *port)
    nobodys = save_student(tmp_path / "student.pt", ARD.from_teacher(random_teacher(), history_layers=1))
    assert "does not say whose trajectories" in refused(capsys, "app.py", "--ckpt-path", nobodys, *port)
    beside = ("app.py", "--ckpt-path", student_file, "--beside", nobodys, *port)
    assert "learned from another teacher, or another target: teacher_hash is None there" in refused(capsys, *beside)
    encoder = ("app.py", "--ckpt-path", student_file, "--encoder", "words", *port)
    assert "--encoder words: this student has classes and reads no text" in refused(capsys, *encoder)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        assert f"--port {number}: choose another" in refused(capsys, "app.py", "--port", number)
    assert "--port 99999: choose another" in refused(capsys, "app.py", "--port", 99999)


@pytest.mark.slow
def test_a_browser_draws_and_edits(student_file, step_file, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    pytest.importorskip("gradio", reason="gradio is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    with sync_api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path  # where `playwright install chromium` puts it
    browser_path = next(filter(None, map(shutil.which, (*names, own))), None)
    if browser_path is None:
        pytest.skip("there is no Chromium: .venv/bin/playwright install --with-deps chromium")
    port = free_port()
    picture(digits_images()[0][:1].float() / 127.5 - 1).save(tmp_path / "upload.png")
    said, elsewhere = [], []
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(
            start("app.py", "--ckpt-path", student_file, "--beside", step_file, "--port", port)
        )
        stack.callback(process.terminate)
        assert process.stdout.readline().strip() == f"http://127.0.0.1:{port}"
        browser = stack.enter_context(sync_api.sync_playwright()).chromium.launch(
            executable_path=browser_path, args=["--no-sandbox"]
        )
        stack.callback(browser.close)
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        here = (f"http://127.0.0.1:{port}", "data:", "blob:")
        page.on("request", lambda request: None if request.url.startswith(here) else elsewhere.append(request.url))
        page.goto(f"http://127.0.0.1:{port}")
        for name in range(10):
            if name != 3:
                page.get_by_label(str(name), exact=True).uncheck()
        page.get_by_role("button", name="Draw").click()
        shown = page.locator(".picture img")
        sync_api.expect(shown).to_have_count(5, timeout=60_000)  # both samples and three predictions before
        sync_api.expect(page.get_by_text("1 at once")).to_be_visible()
        loaded = "[...document.querySelectorAll('.picture img')].every(i => i.naturalWidth == 176)"  # 20 times as large
        page.wait_for_function(loaded, timeout=60_000)
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        box = page.locator(".gradio-container").bounding_box()
        assert box["width"] <= 1100 and abs(2 * box["x"] + box["width"] - page.viewport_size["width"]) <= 16  # centred
        page.get_by_role("tab", name="Point by point").click()
        page.get_by_role("button", name="Draw the points").click()
        sync_api.expect(shown).to_have_count(8, timeout=60_000)  # and three rows
        page.screenshot(path=tmp_path / "points.png", full_page=True)
        page.get_by_role("tab", name="Edit an image").click()
        page.locator("input[type=file]").first.set_input_files(tmp_path / "upload.png")
        sync_api.expect(page.locator("#source img")).to_be_visible(timeout=60_000)
        page.get_by_role("button", name="Edit", exact=True).click()
        sync_api.expect(shown).to_have_count(10, timeout=60_000)
        page.screenshot(path=tmp_path / "edit.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 10_000 and not said and not elsewhere
    assert process.wait() == 1  # ended by SIGTERM, as it says
