"""Options as dataclasses: what the parser takes of a field, what comes back, and defaults of a script's own."""

from dataclasses import dataclass

import pytest

from runtime import cli
from runtime.options import add_options, option, read_options


@dataclass(frozen=True)
class Speed:
    """How fast."""

    steps_per_log: int = option(100, "Steps between log lines.", cli.positive)
    rate: float | None = option(None, "Rate of it.", cli.positive_number)
    warm: bool = option(False, "Begin slowly.")
    loud: bool = option(False, "Say so.", action="store_true")
    unit: str = option("s", "Count in this.", choices=("s", "ms"))


def parsed(*words: str, **defaults) -> Speed:
    parser = cli.Parser()
    parser.add_argument("--other", default=1)
    add_options(parser, Speed, **defaults)
    return read_options(Speed, vars(parser.parse_args(list(words))))


def test_fields_are_options_and_come_back_with_their_types_and_defaults():
    assert parsed() == Speed() == Speed(100, None, False, False, "s")
    given = parsed("--steps-per-log", "1e3", "--rate=0.5", "--warm", "--loud", "--unit", "ms")
    assert given == Speed(1000, 0.5, True, True, "ms")
    assert parsed(steps_per_log=7, warm=True) == Speed(7, warm=True)
    assert not parsed("--no-warm", warm=True).warm


@pytest.mark.parametrize("words", [("--steps-per-log", "0"), ("--unit", "h"), ("--no-loud",)])
def test_what_a_field_does_not_take_is_refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        parsed(*words)
    assert stop.value.code == 2 and words[0] in capsys.readouterr().err
