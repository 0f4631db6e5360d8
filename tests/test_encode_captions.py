"""A text file becomes a store of captions: resumable, the same by any number of ranks, or one sentence.

The store's tokens; resuming, ranks and a kill; ends of lines, long captions; bad text in one sentence each.
Then T5, in place of words, and the plan.
"""

import json
import os

import pytest
import torch
from helpers import call, call_on_ranks, contents, refused, spawn
from safetensors.torch import load_file
from text_helpers import save_t5

from runtime.text import WordEncoder
from stores.captions import CaptionStore
from stores.digits import NUMBERS

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
    assert y.shape == (3, 6, 64) and y.dtype == torch.float16
    assert torch.equal(y[0], tokens[0].half().float()) and torch.equal(y[2], tokens[2].half().float())
    assert torch.equal(y[1, :1], tokens[1].half().float()) and not y[1, 1:].any()
    call("stores.captions", "verify", out)
    assert "ok, 40 captions by words" in capsys.readouterr().out


def test_an_is_read_as_a():
    """So that captions may be English; the shipped teacher was trained on "a eight"."""
    encoder = WordEncoder()
    (an,), (a,) = encoder(["An eight above an eight"])[0], encoder(["a eight above a eight"])[0]
    assert torch.equal(an, a) and encoder.hash == "573b9b7afe2dedb3"  # of assets/README.md


def test_a_folder_of_text_files_is_read_in_the_order_of_their_names(tmp_path, capsys):
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name, text in (("b.txt", "a four"), ("a.txt", "a one\na two\n"), ("notes.md", "not a caption")):
        (folder / name).write_text(text)
    common = ("encode_captions.py", "--encoder", "words", "--text", folder, "--out", tmp_path / "store")
    call(*common)
    store = CaptionStore(tmp_path / "store")
    assert [store.text(i) for i in range(store.count)] == ["a one", "a two", "a four"]
    assert store.provenance["text"] == "prompts"
    (folder / "b.txt").write_text("a five")
    assert "text_sha256 is" in refused(capsys, *common)
    (folder / "b.txt").write_text("")
    assert f"--text {folder}/b.txt: the file is empty" in refused(capsys, *common)
    for file in folder.glob("*.txt"):
        file.unlink()
    assert "the folder holds no .txt files" in refused(capsys, *common)


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


def test_two_ranks_and_a_kill_leave_the_same_files(tmp_path):
    wanted = contents(encode(tmp_path, tmp_path / "whole"))
    words = ("--text", tmp_path / "captions.txt", "--encoder", "words", "--rows-per-shard", 8, "--device", "cpu")
    assert call_on_ranks(2, "encode_captions.py", *words, "--out", tmp_path / "ranks") == [0, 0]
    assert contents(tmp_path / "ranks") == wanted
    killed = call_on_ranks(1, "encode_captions.py", *words, "--out", tmp_path / "killed", kill="00003.safetensors")
    assert killed == [-9] and not (tmp_path / "killed/manifest.json").exists()
    assert len(list((tmp_path / "killed").glob("*.safetensors"))) == 3
    call("encode_captions.py", *words, "--out", tmp_path / "killed")
    assert contents(tmp_path / "killed") == wanted


def test_lines_end_as_on_any_system_and_nowhere_else(tmp_path):
    (tmp_path / "text.txt").write_bytes("\ufeffa three\r\na four\x0babove\u2028a one".encode())
    call("encode_captions.py", "--text", tmp_path / "text.txt", "--encoder", "words", "--out", tmp_path / "out")
    store = CaptionStore(tmp_path / "out")
    assert [store.text(i) for i in range(store.count)] == ["a three", "a four\x0babove\u2028a one"]


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_two_captions_are_two_whatever_ends_their_lines(end, last, tmp_path, capsys):
    (tmp_path / "text.txt").write_bytes(f"a three{end}a four{end * last}".encode())
    call("encode_captions.py", "--text", tmp_path / "text.txt", "--encoder", "words", "--out", tmp_path / "out")
    store = CaptionStore(tmp_path / "out")
    assert [store.text(i) for i in range(store.count)] == ["a three", "a four"]
    assert "2 captions" in capsys.readouterr().out


def test_long_captions_are_cut_with_a_count(tmp_path, capsys):
    out = encode(tmp_path, tmp_path / "store", captions=["a " * 10_000, "a three"])
    assert "2 captions, 1 of them cut to 16 tokens" in capsys.readouterr().out
    assert CaptionStore(out).max_text_tokens == 16 and CaptionStore(out).cut == 1


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
        assert not out.exists()
    text.write_text("a three\n")
    for options, sentence in (
        (("--out", text), f"--out {text}: is a file, give a folder"),
        (("--out", tmp_path), "the folder holds other files, give a new one"),
        (("--encoder", tmp_path, "--dry-run"), "cannot load T5; give a folder in transformers' layout"),
    ):
        assert sentence in refused(capsys, *command, *options)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
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


def test_without_a_network_the_cache_is_used_and_what_it_lacks_is_one_sentence_at_once(tmp_path):
    """In a process of its own that is not told to be offline: the hub's client would tell of each attempt."""
    (tmp_path / "text.txt").write_text("a three\n")
    unreachable = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache")}
    command = ("encode_captions.py", "--text", tmp_path / "text.txt", "--encoder", "me/t5", "--out", tmp_path / "store")
    done = spawn(*command, env=os.environ | unreachable)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert "--encoder me/t5: cannot load T5 and its tokenizer; " in done.stderr and "hf download me/t5 " in done.stderr
    assert not (tmp_path / "store").exists()
    repository, revision = tmp_path / "cache/hub/models--me--t5", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    save_t5(repository / "snapshots" / revision)
    done = spawn(*command, env=os.environ | unreachable)
    assert done.returncode == 0 and "1 captions, 0 of them cut" in done.stdout, done.stderr


@pytest.mark.parametrize("scale", [1e30, 0.0], ids=["not finite", "zero"])  # in fp16; in a store, zero is padding
def test_t5_that_gives_no_number_is_refused(scale, tmp_path, capsys):
    folder = save_t5(tmp_path / "t5", scale)
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


def test_a_plan_says_what_is_then_written_and_loads_nothing(tmp_path, capsys, monkeypatch):
    text, folder = tmp_path / "captions.txt", save_t5(tmp_path / "t5")
    text.write_text("".join(caption + "\n" for caption in CAPTIONS))
    command = ("encode_captions.py", "--text", text, "--out", tmp_path / "out")

    def plan(*options) -> dict:
        capsys.readouterr()
        call(*command, *options, "--dry-run")
        return json.loads(capsys.readouterr().out)

    words, t5, public = plan("--encoder", "words"), plan("--encoder", folder), plan()
    assert (words["count"], words["channels"], words["steps"]) == (41, 64, 2) and not (tmp_path / "out").exists()
    assert t5["channels"] == 12 and t5["encoder_hash"] is None and t5["memory_bytes_per_rank"]["weights"] > 1000
    assert public["not_checked"].endswith("would be fetched from the Hugging Face hub")
    call(*command, "--encoder", "words")
    assert words["disk_bytes"] == pytest.approx((tmp_path / "out/shard-00000.safetensors").stat().st_size, rel=0.1)
    (folder / "text_encoder/config.json").write_text("{}")
    assert "cannot load T5; give a folder" in refused(capsys, *command, "--encoder", folder, "--dry-run")
