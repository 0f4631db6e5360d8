"""Presets set options that exist, to the paper's values, for every row of Table 1."""

import importlib
import json

import pytest
from helpers import call, refused

from presets import FLOW_ODES, FLOW_ROWS, TABLE_1, TEXT_TEACHERS, preset

SCRIPTS = ("sample.py", "sample_trajectory.py", "train_ARD.py", "train_ARD_gan.py", "sample_ARD.py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_presets_set_options_that_exist_to_values_that_they_take(script):
    parser = importlib.import_module(script.removesuffix(".py")).build_parser()
    actions = {action.dest: action for action in parser._actions}
    assert preset(script)
    for name, values in preset(script).items():
        known = {*TABLE_1, *TEXT_TEACHERS, *(f"{flow}-{row}" for flow in FLOW_ODES for row in FLOW_ROWS)}
        assert (name in known or name.removesuffix("-step") in known) and values.keys() <= actions.keys()
        for option, value in values.items():
            assert actions[option].choices is None or value in actions[option].choices
            for one in value if isinstance(value, list) else [value]:
                assert actions[option].type is None or actions[option].type(str(one)) == one


def test_text_rows_differ_from_their_baselines_in_history_alone():
    rows = preset("train_ARD.py")
    for name, teacher in TEXT_TEACHERS.items():
        ours, baseline = rows[name], rows[f"{name}-step"]
        assert {key for key in ours if ours[key] != baseline[key]} == {"mask", "stack"}
        assert (ours["steps"], ours["mask"], ours["stack"], ours["target"]) == (3, "M4", 1, "xt")
        assert (ours["solver_steps"], ours["iterations"], ours["online"]) == (48, 15_000, True)
        assert ours["teacher"] == teacher == preset("sample.py")[name]["teacher"]
        assert {name, f"{name}-step"} <= preset("sample_ARD.py").keys()


def test_the_text_rows_cost_what_was_counted_beforehand(capsys):
    """The teacher's 48 guided steps and the student's training step, of a sample: at 512 pixels about 135 TFLOP."""
    per_sample = {}
    for name, side in (("t2i-sigma-512", 64), ("t2i-sigma-1024", 128)):
        call("train_ARD.py", "--preset", name, "--dry-run")
        plan = json.loads(capsys.readouterr().out)
        per_sample[side] = plan["flops"] / (15_000 * 64)
        assert plan["memory_bytes_per_rank"]["batch"] == 64 * (4 * 4 * 4 * side**2 + 2 * 300 * 4096)
    assert 125e12 < per_sample[64] < 145e12 and 600e12 < per_sample[128] < 750e12


def test_flow_rows_differ_from_dits_in_the_teachers_ode_alone(capsys):
    """As published: 1.5 on three channels everywhere; 1.8 on all channels, at noise levels up to 0.7."""
    for script in SCRIPTS:
        rows = preset(script)
        for flow, ode in FLOW_ODES.items():
            for name in FLOW_ROWS:
                assert (f"{flow}-{name}" in rows) == (name in rows)
                if name in rows:
                    ours, dits = rows[f"{flow}-{name}"], rows[name]
                    assert {key for key in ours if ours[key] != dits.get(key)} <= ode.keys()
    flops = {}
    for name in ("teacher-25", "sit-teacher-25", "repa-teacher-25"):
        call("sample.py", "--preset", name, "--dry-run")
        plan = json.loads(capsys.readouterr().out)
        flops[name] = plan["flops"]
        assert plan["options"]["solver_steps"] == 25
    assert flops["teacher-25"] == flops["sit-teacher-25"]
    guided = 17 / 25  # 0.68, 0.64 .. 0.04 of the levels 1, 0.96 .. 0.04
    assert flops["repa-teacher-25"] == pytest.approx(flops["teacher-25"] * (1 + guided) / 2, rel=1e-2)


def test_every_row_can_be_reproduced():
    for name, row in TABLE_1.items():
        for script in ("sample.py",) if row.mask is None else ("sample_trajectory.py", "train_ARD.py", "sample_ARD.py"):
            assert name in preset(script), (name, script)
        assert (row.loss == "R+D") == (name in preset("train_ARD_gan.py"))


def test_a_preset_is_the_default_and_options_override_it(store, tmp_path, capsys):
    command = ("train_ARD.py", "--data-path", store, "--preset", "ard-n6-m2-s4", "--model", "DiT-Nano/2", "--stack", 2)
    call(*command, "--run-dir", tmp_path / "run", "--dry-run")
    plan = json.loads(capsys.readouterr().out)
    assert plan["model"]["mask"] == "M2" and plan["model"]["history_layers"] == 2
    assert plan["iterations"] == plan["options"]["iterations"] == 300_000 and plan["training"]["ema_decay"] == 0.9999
    assert "ard-n7" in refused(capsys, *command[:4], "ard-n7", "--dry-run") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "script", [pytest.param(script, marks=[pytest.mark.slow] if "gan" in script else []) for script in SCRIPTS]
)
def test_a_preset_can_be_looked_at_without_weights_and_data(script, capsys):
    for name, values in preset(script).items():
        call(script, "--preset", name, "--dry-run")
        plan = json.loads(capsys.readouterr().out)
        assert values.items() <= plan["options"].items() and plan["not_checked"]
        assert ("flops_over_regression" in plan) == (script == "train_ARD_gan.py")


def test_a_preset_that_an_override_makes_impossible_is_still_shown(capsys):
    call("train_ARD_gan.py", "--preset", "ard-n6-m4-s4-gan", "--model", "DiT-Nano/2", "--dry-run")
    assert "history layers 6" in json.loads(capsys.readouterr().out)["not_counted"]


def test_a_script_without_presets_says_so():
    with pytest.raises(ValueError, match="no presets for demo.py"):
        preset("demo.py")
