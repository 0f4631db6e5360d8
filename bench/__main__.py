"""``python -m bench``: see bench/benchmark.py."""

from bench.benchmark import build_parser, run
from runtime import cli

if __name__ == "__main__":
    cli.main(build_parser(), run)
