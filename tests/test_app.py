"""The page draws the samplers' images, and a real browser shows it."""

import contextlib
import shutil
import socket
import sys

import pytest
import torch
from helpers import random_teacher, refused, save_student, start

from app import Comparison, picture
from models_ard import ARD
from runtime.randomness import noise
from runtime.vae import Pixels
from sampler import learned_ode
from stores import checkpoints
from stores.digits import digits_images


def free_port() -> int:
    """A port that nothing listens at."""
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]


@pytest.fixture(scope="module")
def models(student_file) -> Comparison:
    """The small student beside its teacher."""
    student, config = checkpoints.load_student(student_file)
    names = [str(i) for i in range(10)]
    return Comparison(student, learned_ode(config["provenance"], student_file), Pixels(), names, torch.device("cpu"))


@torch.no_grad()
def test_both_pictures_are_of_the_same_noise_and_labels(models):
    z, y = noise(4, "sample", [2, 7], (1, 8, 8)), torch.tensor([2, 7])
    teacher, teacher_time, on_the_way, student_time = models.draw([2, 7], 4)
    assert teacher.tobytes() == picture(models.ode.sample(z, y)).tobytes() and min(teacher_time, student_time) > 0
    wanted = models.student.sample(z, y)
    assert [image.tobytes() for image in on_the_way] == [picture(wanted[:, k]).tobytes() for k in range(4)]
    assert teacher.size == (2 * 168 + 8, 168 + 8)  # 20 times as large, and a margin
    assert picture(torch.zeros(7, 3, 256, 256)).size == (5 * 264 + 8, 2 * 264 + 8)  # two rows, as they are


@torch.no_grad()
def test_an_upload_takes_the_place_of_a_prediction(models):
    image = digits_images()[0][:1]
    upload = picture(image.float() / 127.5 - 1).crop((8, 8, 168, 168)).resize((8, 8), 0)
    source, edited = models.edit(upload, [1, 5], 0, 2)
    latents = image.float() / 127.5 - 1
    assert source.tobytes() == picture(latents).tobytes()
    given = {1: latents.expand(2, -1, -1, -1)}
    wanted = models.student.sample(noise(0, "sample", [1, 5], (1, 8, 8)), torch.tensor([1, 5]), given)
    assert edited.tobytes() == picture(wanted[:, -1]).tobytes()


def test_what_is_missing_is_named(student_file, tmp_path, monkeypatch, capsys):
    port = ("--port", free_port())
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gradio", None)
        assert "app.py needs gradio: pip install -r requirements-extra.txt" in refused(capsys, "app.py", *port)
    monkeypatch.setitem(sys.modules, "gradio", sys)  # is not reached
    monkeypatch.chdir(tmp_path)
    assert "run `make demo`, or give a checkpoint" in refused(capsys, "app.py", *port)
    nobodys = save_student(tmp_path / "student.pt", ARD.from_teacher(random_teacher(), history_layers=1))
    assert "does not say whose trajectories" in refused(capsys, "app.py", "--ckpt-path", nobodys, *port)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        assert f"--port {number}: choose another" in refused(capsys, "app.py", "--port", number)
    assert "--port 99999: choose another" in refused(capsys, "app.py", "--port", 99999)


@pytest.mark.slow
def test_a_browser_draws_and_edits(student_file, tmp_path):
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
        process = stack.enter_context(start("app.py", "--ckpt-path", student_file, "--port", port))
        stack.callback(process.terminate)
        assert process.stdout.readline().strip() == f"http://127.0.0.1:{port}"
        browser = stack.enter_context(sync_api.sync_playwright()).chromium.launch(
            executable_path=browser_path, args=["--no-sandbox"]
        )
        stack.callback(browser.close)
        page = browser.new_page()
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
        sync_api.expect(shown).to_have_count(6, timeout=60_000)  # both samples and four predictions
        sync_api.expect(page.get_by_text("1 at once")).to_be_visible()
        loaded = "[...document.querySelectorAll('.picture img')].every(i => i.naturalWidth == 160)"  # 20 times as large
        page.wait_for_function(loaded, timeout=60_000)
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        page.get_by_role("tab", name="Edit an image").click()
        page.locator("input[type=file]").first.set_input_files(tmp_path / "upload.png")
        sync_api.expect(page.locator("#source img")).to_be_visible(timeout=60_000)
        page.get_by_role("button", name="Edit", exact=True).click()
        sync_api.expect(shown).to_have_count(8, timeout=60_000)
    assert (tmp_path / "page.png").stat().st_size > 10_000 and not said and not elsewhere
    assert process.wait() == 1  # ended by SIGTERM, as it says
