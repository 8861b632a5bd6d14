"""The command line, as a user meets it: what it refuses and how, and that no run is lost."""

import json
import os
import platform
import signal
import statistics
import subprocess
import sys

import keras
import numpy as np
import pytest
from absl.testing import flagsaver
from command_lines import ROOT, TINY, invoke, start
from tensorflow.python.framework import config

from ortho_keras.trainer import command
from ortho_keras.trainer.recipes import RECIPES

_SETTINGS = """
import os, train
from tensorflow.python.util import _pywrap_util_port

print(_pywrap_util_port.IsMklEnabled(), os.environ["TF_FORCE_GPU_ALLOW_GROWTH"])
"""


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="x86 only")
def test_onednn_is_on_and_the_users_variables_stay():
    environment = {name: value for name, value in os.environ.items() if name != "TF_ENABLE_ONEDNN_OPTS"}
    environment["TF_FORCE_GPU_ALLOW_GROWTH"] = "false"
    done = subprocess.run([sys.executable, "-c", _SETTINGS], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("True false\n", "")  # and none of TensorFlow's notes


def test_home_in_a_path_and_values_without_effect(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    given = ["--optimizer=adam", "--momentum=0.5", "--tolerance=3", "--factor=0.1", "--cutout=1", "--grow_epoch=1"]
    values = [*TINY, "--max_steps=2", "--warmup_steps=2", "--workdir=~/run", "--export=~/net.keras"]
    status, out, err = invoke(capsys, *values, *given)
    rulers = {
        "momentum": "optimizer adam",
        "tolerance": "modulation off",
        "cutout": "augment none",
        "grow_epoch": "start_depth 0",
    }
    assert sorted(err.splitlines()) == sorted(f"train.py: --{name} has no effect with --{by}" for name, by in rulers.items())
    assert status == 0 and f"{tmp_path / 'net.keras'}: 7 of 7 BatchNormalization layers folded" in out
    assert {path.name for path in tmp_path.iterdir()} == {"run", "net.keras", "net.classes.json"}


def test_the_name_of_a_run_is_one_that_a_file_system_takes():
    name = command.default_workdir("digits", {"dataset": "folder:" + 60 * "/long"}).name
    other = command.default_workdir("digits", {"dataset": "folder:" + 61 * "/long"}).name
    assert name.startswith("digits-") and len(name) < 40 and name != other
    assert command.default_workdir("digits", {"seed": 3}).name == "digits-seed=3"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--recipe=plain44_cifar1"], ["A recipe must be", "did you mean plain44_cifar10?", "'plain44_cifar1'"]),
        (["--list_recipes=digit"], ["did you mean digits?", "'digit'"]),
        (["--dataset=no_such_data"], ["--dataset must be digits, folder:PATH or", "'no_such_data'"]),
        (["--optimizer=newton"], ["flag --optimizer=newton: value should be one of <sgd|"]),
        (["--depth=45"], ["--depth must be 6n + 2; the nearest are 44 and 50", "45"]),
        (["--batch_size=5000"], ["--batch_size must be at most the number of training images, 1293", "5000"]),
        (
            ["--recipe=digits", "--recipe_file=a.json"],
            ["--recipe and --recipe_file must not both be given", "'a.json'"],
        ),
        (["--recipe_file=a.json"], ["--recipe_file must be a JSON file with a recipe", "'a.json'"]),
        (["--nobn_sync=3"], ["--nobn_sync=3 does not take an argument"]),
        (["--learning_rat=0.1"], ["Unknown command line flag 'learning_rat'. Did you mean: learning_rate"]),
        (["0.1"], ["every argument must be a flag", "0.1"]),
        (["--export=net.onnx"], ["--export must end in .keras or .tflite", "'net.onnx'"]),
        (["--keep_checkpoints=0"], ["flag --keep_checkpoints=0: 0 is not a positive integer"]),
        (["--strategy=multi_worker"], ["--strategy multi_worker needs the environment variable TF_CONFIG", "not set"]),
        (["--devices=GPU:7"], ["--devices must be a number of devices or names of one kind", "'GPU:7'"]),
        (
            ["--depth=99999998"],
            ["--depth and --width must be of a network that fits the memory", "99999998 layers of width 16"],
        ),
        (
            ["--width=10000000"],
            ["--depth and --width must be of a network that fits the memory", "44 layers of width 10000000"],
        ),
        (["--export=run/final.keras"], ["--export must be another path than those of the run's own files", "run/final.keras'"]),
        (["--workdir=/dev/null/run"], ["--workdir must be a folder that can be written", "'/dev/null/run'"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(tmp_path)
    status, out, err = invoke(capsys, f"--workdir={tmp_path}/run", *arguments)
    assert (status, out) == (2, "") and len(err.strip().splitlines()) == 1 and err.startswith("train.py: ")
    assert all(part in err for part in expected), err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_list_recipes(capsys, monkeypatch):
    status, out, _ = invoke(capsys, "--list_recipes")
    names = [name for name in RECIPES if not name.endswith("_l2")]
    *lines, last = out.splitlines()
    assert status == 0 and len(lines) == 3 * len(names) and last.startswith("NAME_l2 is a recipe's baseline")
    shown = {name: lines[3 * at : 3 * at + 3] for at, name in enumerate(names)}
    assert all(first.startswith(f"{name}: ") for name, (first, *_) in shown.items())
    _, reached, differs = shown["plain110_cifar10"]
    assert reached.startswith("    paper, %: 81.6") and "--depth=110" in differs and "--width" not in differs
    paths = sorted((command.RESULTS / "recipes").glob("digits-seed*.json"))
    mean = statistics.mean(json.loads(path.read_text())["test_accuracy"] for path in paths)
    assert f"measured: {100 * mean:.2f} % test accuracy, mean of {len(paths)} seed(s)" in shown["digits"][1]
    assert "; digits_l2: " in shown["digits"][1]
    assert "; plain1004_digits_l2: the loss became nan at step 2 of 200" in shown["plain1004_digits"][1]
    part = json.loads((command.RESULTS / "paper" / "neighbour-depth44-factor0.0001-rate0.1-steps8000-seed0.json").read_text())
    expected = f"not yet at this length; {100 * part['test_accuracy']:.2f} % test accuracy after 8,000 of 64,000 steps"
    assert expected in shown["plain44_cifar10"][1] and "measured: not yet; " in shown["plain34_imagenet"][1]
    monkeypatch.setattr(command, "RESULTS", command.RESULTS / "none")  # as in an installed package
    assert "measured" not in invoke(capsys, "--list_recipes")[1]
    _, out, _ = invoke(capsys, "--list_recipes=plain110_cifar10")
    with flagsaver.flagsaver():
        command.parse_flags(["train.py", *out.split()])
        assert command.recipe_from_flags()[0] == RECIPES["plain110_cifar10"].recipe


def test_non_finite_loss_stops_with_a_message(tmp_path, capsys):
    status, _, err = invoke(capsys, f"--workdir={tmp_path}", *TINY, "--learning_rate=1e30", "--schedule=constant")
    assert status == 1 and len(err.strip().splitlines()) == 1
    assert "the loss became" in err and "at step" in err and "--learning_rate" in err
    assert not (tmp_path / "result.json").exists()


def test_a_folder_of_images_is_learned(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for label, base in (("dark", 40), ("light", 200)):
        (tmp_path / label).mkdir(parents=True)
        for index in range(30):
            pixels = np.clip(rng.normal(base, 20, (8, 8, 3)), 0, 255)
            keras.utils.save_img(tmp_path / label / f"{index}.png", pixels, scale=False)
    given = ["--width=4", "--batch_size=16", "--epochs=12", "--learning_rate=0.03", "--augment=crop_flip"]
    status, out, err = invoke(capsys, *TINY, f"--dataset=folder:{tmp_path}", f"--workdir={tmp_path}/../run", *given)
    assert (status, err) == (0, "") and "images (8, 8, 3), 2 classes" in out
    assert "test accuracy 1.0000, test accuracy with mirror images 1.0000" in out


STOPPED = (*TINY, "--width=4", "--epochs=24", "--evaluate_every=12", "--deterministic")


@pytest.fixture
def deterministic():
    yield
    config.disable_op_determinism()


def wait_for_line(process, text):
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"no line with {text!r}; stderr: {process.stderr.read()}")


def without_times(content):
    if isinstance(content, dict):
        return {key: without_times(value) for key, value in content.items() if "second" not in key and key != "images/s"}
    return [without_times(value) for value in content] if isinstance(content, list) else content


def test_a_run_that_was_killed_and_stopped_ends_as_one_that_was_not(tmp_path, capsys, deterministic):
    """Equal to the bit; while it runs, its folder is refused to another."""
    run = ["train.py", f"--workdir={tmp_path / 'run'}", *STOPPED]
    process = start(*run)
    wait_for_line(process, "epoch 3/")
    assert "--workdir is in use by another process" in invoke(capsys, *run[1:])[2]
    process.kill()
    assert process.communicate() and process.returncode == -signal.SIGKILL
    process = start(*run)
    wait_for_line(process, "resuming after step")
    wait_for_line(process, "epoch ")
    process.terminate()
    _, err = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM and "stopped after step" in err and err.count("\n") == 1
    assert not (tmp_path / "run" / "result.json").exists()
    status, out, err = invoke(capsys, *run[1:])
    assert (status, err) == (0, "") and "resuming after step" in out
    assert invoke(capsys, f"--workdir={tmp_path / 'whole'}", *STOPPED)[0] == 0
    for name in ("result.json", "history.json"):
        mine, expected = (json.loads((tmp_path / folder / name).read_text()) for folder in ("run", "whole"))
        assert without_times(mine) == without_times(expected)
    weights = (keras.models.load_model(tmp_path / folder / "final.keras").get_weights() for folder in ("run", "whole"))
    for mine, expected in zip(*weights):
        np.testing.assert_array_equal(mine, expected)

    def written():
        return sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "whole").rglob("*") if path.name != ".lock")

    before = written()
    status, out, _ = invoke(capsys, f"--workdir={tmp_path / 'whole'}", *STOPPED)
    assert status == 0 and "finished already" in out
    status, _, err = invoke(capsys, f"--workdir={tmp_path / 'whole'}", *STOPPED, "--factor=0.5")
    assert status == 2 and err.count("\n") == 1 and "factor=" in err and "0.5 here" in err
    assert written() == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    assert "--workdir must be empty or hold this very run" in invoke(capsys, f"--workdir={tmp_path / 'notes'}", *TINY)[2]
    assert os.listdir(tmp_path / "notes") == ["notes.txt"]


def test_input_size_is_image_size_and_the_recipe_fits_the_depth():
    with flagsaver.flagsaver():
        command.parse_flags(["train.py", "--recipe=digits", "--depth=1004", "--input_size=8"])
        recipe, _, given = command.recipe_from_flags()
    assert given == {"depth": 1004, "image_size": 8}
    assert (recipe.initializer, recipe.relu_shift) == ("dirac", 1)
    assert recipe.peak_learning_rate == pytest.approx(0.03 * 44 / 1004)
