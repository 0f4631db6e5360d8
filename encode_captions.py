"""Encode a file of captions, one a line, or a folder of such, once into a store for the scripts' --captions to read.

    python encode_captions.py --text prompts.txt --out data/prompts
    torchrun --nproc_per_node=8 encode_captions.py --text prompts.txt --encoder FOLDER --out data/prompts
    python encode_captions.py --text scenes.txt --encoder words --out data/scenes

T5's tokens take 8 KB each; COCO's captions about 0.1 MB. The files do not depend on the number of ranks. To resume, run
the same command again: finished shards are kept.
"""

import argparse
import hashlib
from pathlib import Path

import torch

from costs.commands import check_plan, plan_captions
from runtime import cli, distributed
from runtime.checks import writable_folder
from runtime.cli import RunError, UserError
from runtime.files import file_sha256, read_lines
from runtime.text import T5, T5Outline, WordEncoder, load_encoder
from stores.captions import KIND, CaptionStore, shard_tensors
from stores.shards import ShardWriter, add_store_options


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, description="Encode a file of captions into a store.")
    group = parser.add_argument_group("captions and encoder")
    group.add_argument(
        "--text",
        type=cli.file,
        required=True,
        help="Text file in UTF-8, one caption a line, or a folder of such, *.txt.",
    )
    group.add_argument(
        "--encoder",
        type=cli.name,
        default=T5,
        help='T5, a folder or hub id, or the word "words": the vectors of the text demo.',
    )
    group.add_argument("--encoder-precision", choices=("bf16", "fp32"), default="bf16", help="T5's number format.")
    group.add_argument(
        "--max-tokens",
        type=cli.positive,
        help="Cut captions to this number of tokens; without it 300, and 16 for words.",
    )
    group = parser.add_argument_group("store")
    add_store_options(group, "Captions")
    group = parser.add_argument_group("run")
    group.add_argument("--per-proc-batch-size", type=cli.positive, default=32, help="Captions of a rank at once.")
    cli.add_dry_run_option(group)
    distributed.add_device_option(group)
    return parser


def read_captions(path: str) -> tuple[list[str], str]:
    """The captions of a text file, or of a folder's .txt files in the order of their names, and a hash of the text.

    ``UserError`` for an empty line or file, or bytes that are no text.
    """
    files = sorted(Path(path).glob("*.txt")) if Path(path).is_dir() else [Path(path)]
    if not files:
        raise UserError(f"--text {path}: the folder holds no .txt files; give such, or a file, with one caption a line")
    captions: list[str] = []
    for file in files:
        lines = read_lines("--text", file)
        empty = [number for number, caption in enumerate(lines, start=1) if not caption.strip()]
        if empty or not lines:
            where = f"line {empty[0]} is empty" if empty else "the file is empty"
            raise UserError(f"--text {file}: {where}; give one caption a line (the null caption is added by itself)")
        captions += lines
    hashes = [file_sha256(file)[:16] for file in files]
    return captions, hashes[0] if len(files) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]


def run(args: argparse.Namespace) -> None:
    captions, text_hash = read_captions(args.text)
    writable_folder("--out", args.out)
    context = distributed.choose_device(args.device)
    encoder = load_encoder(args.encoder, context.device, args.encoder_precision, args.max_tokens)
    if isinstance(encoder, WordEncoder):
        encoder.require_known(captions)
    rows_and_null = [*captions, ""]
    provenance = {
        "kind": KIND,
        "text": Path(args.text).name,
        "text_sha256": text_hash,
        "encoder": encoder.name,
        "encoder_hash": encoder.hash,
        "encoder_precision": args.encoder_precision,
        "channels": encoder.channels,
        "max_tokens": encoder.max_tokens,
        "num_classes": len(rows_and_null),
        "count": len(rows_and_null),
        "rows_per_shard": args.rows_per_shard,
    }
    distributed.join(context)
    plan = plan_captions(vars(args), context, rows=rows_and_null, encoder=encoder)
    if isinstance(encoder, T5Outline):  # of a dry run: its hash, by which a store is known, would take loading it
        check_plan(plan, provenance, vars(args), context)
        return
    writer = ShardWriter(args.out, provenance, context, unit="caption")
    check_plan(plan, provenance, vars(args), context)

    with writer:
        for rows in writer.missing_shards():
            tokens: list[torch.Tensor] = []
            uncut: list[int] = []
            for start in range(rows.start, rows.stop, args.per_proc_batch_size):
                batch = rows_and_null[start : min(start + args.per_proc_batch_size, rows.stop)]
                parts, lengths = encoder(batch)
                for number, part in enumerate(parts, start=start + 1):
                    if not part.half().isfinite().all() or not part.half().any(-1).all():
                        raise RunError(
                            f"--encoder {args.encoder}: the tokens of caption {number} are not finite, or zero; try "
                            "--encoder-precision fp32"
                        )
                tokens += parts
                uncut += lengths
                writer.progress(len(batch))
            writer.write(rows, shard_tensors(rows, rows_and_null[rows.start : rows.stop], tokens, uncut))
    if context.is_main:
        cut = CaptionStore(args.out).cut
        print(
            f"{args.out}: " + ("already complete, " if writer.complete else "") + f"{len(captions)} captions"
            f", {cut} of them cut to {encoder.max_tokens} tokens"
        )
    distributed.finish(context)


if __name__ == "__main__":
    cli.main(build_parser(), run)
