"""A text file becomes a store of captions: resumable, the same by any number of ranks, or one sentence."""

import json
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, call, contents, refused, spawn
from safetensors.torch import load_file
from text_helpers import save_t5

from runtime.text import WordEncoder
from stores.captions import CaptionStore
from stores.images import NUMBERS

CAPTIONS = [f"a {a} {r} a {b}" for r in ("above", "beside") for a in NUMBERS for b in NUMBERS[:2]]


def encode(folder, out, *more, captions=CAPTIONS):
    """Write captions to a file and encode it in shards of 8."""
    text = folder / "captions.txt"
    text.write_text("\n".join(captions) + "\n")
    call("encode_captions.py", "--text", text, "--encoder", "words", "--out", out, "--rows-per-shard", 8, *more)
    return out


def test_a_store_gives_the_encoders_tokens_and_the_null_caption_last(tmp_path, capsys):
    out = encode(tmp_path, tmp_path / "store", "--per-proc-batch-size", 3)
    assert "40 captions, 0 of them cut to 16 tokens" in capsys.readouterr().out
    store = CaptionStore(out)
    assert (
        store.count == 40 and len(store.shards) == 6 and [store.text(i) for i in (0, 39)] == [CAPTIONS[0], CAPTIONS[-1]]
    )
    y = store(torch.tensor([39, 40, 0]))
    tokens, _ = WordEncoder()([CAPTIONS[39], "", CAPTIONS[0]])
    assert y.shape == (3, 6, 64) and y.dtype == torch.float32
    assert torch.equal(y[0], tokens[0].half().float()) and torch.equal(y[2], tokens[2].half().float())
    assert torch.equal(y[1, :1], tokens[1].half().float()) and not y[1, 1:].any()
    call("stores.captions", "verify", out)
    assert "ok, 40 captions by words" in capsys.readouterr().out


def test_a_broken_run_is_continued_and_ranks_share_the_work(tmp_path):
    whole = encode(tmp_path, tmp_path / "whole")
    wanted = contents(whole)
    part = encode(tmp_path, tmp_path / "part")
    for name in ("manifest.json", "shard-00001.safetensors", "shard-00004.safetensors"):
        (part / name).unlink()
    encode(tmp_path, part)
    assert contents(part) == wanted
    encode(tmp_path, part, "--per-proc-batch-size", 2)  # complete already
    assert contents(part) == wanted


@pytest.mark.slow
def test_two_ranks_and_a_kill_leave_the_same_files(tmp_path):
    wanted = contents(encode(tmp_path, tmp_path / "whole"))
    text = tmp_path / "captions.txt"
    arguments = ("--text", text, "--encoder", "words", "--rows-per-shard", 8)
    result = spawn("encode_captions.py", *arguments, "--out", tmp_path / "ranks", "--device", "cpu", ranks=2)
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "ranks") == wanted
    killer = (
        "import os, runtime.text as text; calls = []; real = text.WordEncoder.__call__\n"
        "def dying(self, captions):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 4: os.kill(os.getpid(), 9)\n"
        "    return real(self, captions)\n"
        "text.WordEncoder.__call__ = dying\n"
        "import encode_captions as script; from runtime import cli\n"
        "import sys; cli.main(script.build_parser(), script.run, sys.argv[1:])\n"
    )
    words = [str(word) for word in (*arguments, "--out", tmp_path / "killed")]
    killed = subprocess.run([sys.executable, "-c", killer, *words], cwd=ROOT, check=False, capture_output=True)
    assert killed.returncode == -9 and not (tmp_path / "killed/manifest.json").exists()
    call("encode_captions.py", *arguments, "--out", tmp_path / "killed")
    assert contents(tmp_path / "killed") == wanted


def test_lines_end_as_on_any_system_and_nowhere_else(tmp_path):
    (tmp_path / "text.txt").write_bytes("\ufeffa three\r\na four\x0babove\u2028a one".encode())
    call("encode_captions.py", "--text", tmp_path / "text.txt", "--encoder", "words", "--out", tmp_path / "out")
    store = CaptionStore(tmp_path / "out")
    assert [store.text(i) for i in range(store.count)] == ["a three", "a four\x0babove\u2028a one"]


def test_long_captions_are_cut_with_a_count(tmp_path, capsys):
    out = encode(tmp_path, tmp_path / "store", captions=["a " * 10_000, "a three"])
    assert "2 captions, 1 of them cut to 16 tokens" in capsys.readouterr().out
    assert CaptionStore(out).longest == 16 and CaptionStore(out).cut == 1


def test_bad_captions_are_one_sentence_and_nothing_is_written(tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    command = ("encode_captions.py", "--text", text, "--encoder", "words", "--out", out)
    assert "no such file" in refused(capsys, *command)
    for content, sentence in (
        (b"", "the file is empty"),
        (b"a three\n \na four\n", "line 2 is empty; give one caption a line"),
        (b"a three \xff", "not a text file in UTF-8"),
        (b"a three\na horse\n", "does not know 'horse' in the caption 'a horse'"),
    ):
        text.write_bytes(content)
        assert sentence in refused(capsys, *command)
        assert not list(out.glob("*.safetensors"))
    text.write_text("a three\n")
    assert "--max-tokens" in refused(capsys, *command, "--max-tokens", 0)
    encode(tmp_path, tmp_path / "store")
    text.write_text("a four\n")
    other = (
        "encode_captions.py",
        "--text",
        text,
        "--encoder",
        "words",
        "--out",
        tmp_path / "store",
        "--rows-per-shard",
        8,
    )
    assert "holds data of another run: count is 41 there and 2 here" in refused(capsys, *other)


def test_t5_that_gives_no_number_is_refused(tmp_path, capsys):
    folder = save_t5(tmp_path / "t5", broken=True)
    (tmp_path / "text.txt").write_text("a three\n")
    with pytest.raises(SystemExit) as stop:
        call("encode_captions.py", "--text", tmp_path / "text.txt", "--encoder", folder, "--out", tmp_path / "out")
    assert stop.value.code == 1 and "the tokens of caption 1 are not finite, or zero" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_t5s_tokens_reach_the_store(tmp_path):
    folder = save_t5(tmp_path / "t5")
    (tmp_path / "text.txt").write_text("a three\nseven\n")
    call("encode_captions.py", "--text", tmp_path / "text.txt", "--encoder", folder, "--out", tmp_path / "out",
         "--encoder-precision", "fp32")  # fmt: skip
    shard = load_file(tmp_path / "out/shard-00000.safetensors")
    assert shard["length"].tolist() == [3, 2, 1] and shard["tokens"].shape == (6, 12)
    about = json.loads((tmp_path / "out/manifest.json").read_text())["provenance"]
    assert about["max_tokens"] == 300 and about["channels"] == 12 and about["encoder"] == str(folder)
