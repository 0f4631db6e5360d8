"""``python -m lab.report``: see page.py."""

from lab.report.page import build_parser, run
from runtime import cli

if __name__ == "__main__":
    cli.main(build_parser(), run)
