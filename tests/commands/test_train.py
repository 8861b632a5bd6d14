"""The command line, as a user meets it: what it refuses and how, and that no run is lost."""

import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from absl.testing import flagsaver
from PIL import Image

import train

ROOT = pathlib.Path(train.__file__).parent
SMALL = ("--image_size=0", "--depth=8", "--width=4", "--epochs=3", "--batch_size=128", "--warmup_steps=0")


def invoke(capsys, *arguments):
    """Runs `train.py` in this process; returns exit status, stdout and stderr."""
    with flagsaver.flagsaver():
        capsys.readouterr()
        try:
            status = train.main(train.parse_flags(["train.py", *map(str, arguments)]))
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
    return status, out, err


def start(*arguments):
    """Starts `train.py` as a process of its own."""
    command = [sys.executable, str(ROOT / "train.py"), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_line(process, text):
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"no line with {text!r}; stderr: {process.stderr.read()}")


_CONVOLUTIONS = """
import glob, os, sys, train
import tensorflow as tf
from tensorflow.tsl.profiler.protobuf import xplane_pb2

convolve = tf.function(lambda x, w: tf.nn.conv2d(x, w, 1, "SAME"))
tf.profiler.experimental.start(sys.argv[1])
convolve(tf.ones((4, 8, 8, 16)), tf.ones((3, 3, 16, 16)))
tf.profiler.experimental.stop()
(path,) = glob.glob(sys.argv[1] + "/**/*.xplane.pb", recursive=True)
space = xplane_pb2.XSpace.FromString(open(path, "rb").read())
print(f"growth={os.environ['TF_FORCE_GPU_ALLOW_GROWTH']}")
print({entry.name for plane in space.planes for entry in plane.event_metadata.values() if "Conv2D" in entry.name})
"""


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="x86 only")
@pytest.mark.parametrize(
    ("given", "expected", "growth"),
    [
        ({}, "_MklNativeConv2D", "true"),
        ({"TF_ENABLE_ONEDNN_OPTS": "0", "TF_FORCE_GPU_ALLOW_GROWTH": "false"}, "Conv2D:Conv2D", "false"),
    ],
)
def test_convolutions_are_onednns_unless_the_user_says_otherwise(tmp_path, given, expected, growth):
    ours = ("TF_ENABLE_ONEDNN_OPTS", "TF_FORCE_GPU_ALLOW_GROWTH")
    environment = {name: value for name, value in os.environ.items() if name not in ours} | given
    done = subprocess.run(
        [sys.executable, "-c", _CONVOLUTIONS, tmp_path], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert expected in done.stdout and ("Mkl" in done.stdout) == ("Mkl" in expected)
    assert f"growth={growth}\n" in done.stdout  # of a GPU's memory; which there is none of here


def test_a_folder_is_of_one_run_at_a_time(tmp_path):
    arguments = [*SMALL, "--epochs=2000", "--learning_rate=0.001", f"--workdir={tmp_path / 'run'}"]
    running = start(*arguments)
    try:
        wait_for_line(running, "layers, ")
        second = start(*arguments)
        try:
            _, err = second.communicate(timeout=60)
        finally:
            second.kill()
    finally:
        running.kill()
        running.communicate()
    expected = f"train.py: --workdir is in use by another process. Received: '{tmp_path / 'run'}'\n"
    assert (second.returncode, err) == (2, expected)


def test_home_in_a_path(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    values = [*SMALL, "--max_steps=2", "--bn_batches=0", "--workdir=~/run", "--export=~/net.keras"]
    status, out, err = invoke(capsys, *values)
    assert (status, err) == (0, "") and f"{tmp_path / 'net.keras'}: 7 of 7 BatchNormalization layers folded" in out
    assert {path.name for path in tmp_path.iterdir()} == {"run", "net.keras"}


def test_values_without_effect_are_told(capsys, tmp_path):
    given = ["--optimizer=adam", "--momentum=0.5", "--weight_decay=0.1", "--tolerance=3", "--factor=0.1"]
    given += ["--crop_border=1", "--cutout=1", "--grow_epoch=1"]
    values = [*SMALL, "--augment=none", "--max_steps=2", "--bn_batches=0", "--learning_rate=0.001", "--warmup_steps=2"]
    status, out, err = invoke(capsys, *values, *given, f"--workdir={tmp_path / 'run'}")
    told = {"momentum": "optimizer adam", "weight_decay": "optimizer adam"}
    told |= {
        "grow_epoch": "start_depth 0",
        "tolerance": "modulation off",
        "crop_border": "augment none",
        "cutout": "augment none",
    }
    expected = [f"train.py: --{name} has no effect with --{ruler}" for name, ruler in told.items()]
    assert status == 0 and sorted(err.splitlines()) == sorted(expected)
    assert "--warmup_steps=2 is no less than the run: the learning rate does not reach its highest" in out


def test_the_name_of_a_run_is_one_that_a_file_system_takes():
    name = train.default_workdir("digits", {"dataset": "folder:" + 60 * "/long"}).name
    other = train.default_workdir("digits", {"dataset": "folder:" + 61 * "/long"}).name
    assert name.startswith("digits-") and len(name) < 40 and name != other
    assert train.default_workdir("digits", {"seed": 3}).name == "digits-seed=3"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--recipe=plain45"], ["--recipe must be one of digits, ", "'plain45'"]),
        (
            ["--dataset=no_such_data"],
            ["--dataset must be digits, folder:PATH or the name of a TFDS data set", "'no_such_data'"],
        ),
        (["--optimizer=newton"], ["--optimizer must be one of sgd, ", "'newton'"]),
        (["--relu_shift=-0.5"], ["--relu_shift must be at least 0, or -1", "-0.5"]),
        (["--signal_every=-1"], ["--signal_every must be at least 0", "-1"]),
        (["--factor=-1"], ["--factor must be at least 0", "-1.0"]),
        (["--factor=nan"], ["--factor must be a finite number", "nan"]),
        (["--factor=much"], ["flag --factor=much", "float"]),
        (["--depth=45"], ["--depth must be 6n + 2; the nearest are 44 and 50", "45"]),
        (["--start_depth=9"], ["--start_depth must be 6n + 2; the nearest are 8 and 14", "9"]),
        (["--start_depth=2", "--grow_epoch=1"], ["--start_depth must be 6n + 2; the nearest are 8 and 14", "2"]),
        (["--start_depth=44", "--grow_epoch=1"], ["--start_depth must be less than --depth, 44", "44"]),
        (["--start_depth=20"], ["--grow_epoch must be at least 1 and less than --epochs, 30, with --start_depth", "0"]),
        (["--start_depth=20", "--grow_epoch=30"], ["--grow_epoch must be at least 1 and less than --epochs, 30", "30"]),
        (
            ["--start_depth=20", "--grow_epoch=2", "--max_steps=40"],
            ["--max_steps must be 0, or more than those before --grow_epoch, 40", "40"],
        ),
        (["--start_depth=8", "--grow_epoch=1", "--network=residual"], ["--start_depth must be 0 for --network residual", "8"]),
        (
            ["--start_depth=34", "--grow_epoch=1", "--family=imagenet", "--depth=101"],
            ["--start_depth must be 0 for --depth 101 of imagenet", "34"],
        ),
        (["--batch_size=0"], ["--batch_size must be at least 1", "0"]),
        (["--image_size=12", "--crop_border=13"], ["--crop_border must be at most the images' side, 12", "13"]),
        (["--image_size=12", "--cutout=13"], ["--cutout must be at most the images' side, 12", "13"]),
        (["--batch_size=5000"], ["--batch_size must be at most the number of training images, 1293", "5000"]),
        (["--network=residual", "--modulation=anchor"], ["--modulation must be off for --network residual", "'anchor'"]),
        (["--recipe=digits", "--recipe_file=a.json"], ["--recipe and --recipe_file must not both be given", "digits, a.json"]),
        (["--recipe_file=a.json"], ["--recipe_file must be a JSON file with a recipe", "'a.json'"]),
        (["--nobn_sync=3"], ["--nobn_sync=3 does not take an argument"]),
        (["--optimizer=muon", "--momentum=1"], ["--momentum must be below 1 with --optimizer muon", "1.0"]),
        (["--learning_rat=0.1"], ["Unknown command line flag 'learning_rat'"]),
        (["0.1"], ["every argument must be a flag", "0.1"]),
        (["--export=net.onnx"], ["--export must end in .keras or .tflite, or have no suffix (a folder)", "'net.onnx'"]),
        (["--keep_checkpoints=0"], ["--keep_checkpoints must be at least 1", "0"]),
        (["--strategy=many"], ["--strategy must be one of auto, none, mirrored, multi_worker", "'many'"]),
        (["--strategy=multi_worker"], ["--strategy multi_worker needs the environment variable TF_CONFIG", "not set"]),
        (["--devices=GPU:7"], ["--devices must be a number of devices or names of one kind", "'GPU:7'"]),
        (["--dataset=folder:nowhere"], ["--dataset folder:nowhere must name a folder that exists", "'nowhere'"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys, arguments, expected):
    status, out, err = invoke(capsys, f"--workdir={tmp_path}/run", *arguments)
    assert status in (1, 2)
    assert len(err.strip().splitlines()) == 1 and err.startswith("train.py: ") and out == ""
    assert all(part in err for part in expected), err
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not left


def test_folders_that_hold_no_images(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "corrupt" / "cat").mkdir(parents=True)
    (tmp_path / "corrupt" / "cat" / "1.png").write_bytes(b"no image")
    for name, expected in (("empty", "Received: no image"), ("corrupt", "cat/1.png, which does not decode")):
        status, out, err = invoke(capsys, f"--dataset=folder:{tmp_path / name}", f"--workdir={tmp_path / 'run'}")
        assert status == 2 and out == "" and len(err.strip().splitlines()) == 1
        assert f"--dataset folder:{tmp_path / name} must hold" in err and expected in err
        assert not list((tmp_path / "run").glob("*"))


def test_tfds_without_data_and_network(tmp_path, capsys):
    status, out, err = invoke(
        capsys, "--recipe=plain44_cifar10", f"--data_dir={tmp_path / 'tfds'}", f"--workdir={tmp_path}/run"
    )
    assert status == 2 and out == "" and len(err.strip().splitlines()) == 1
    assert "--dataset cifar10 must be prepared in --data_dir or downloadable" in err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_workdir_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    status, out, err = invoke(capsys, f"--workdir={tmp_path / 'file' / 'run'}")
    assert status == 2 and out == "" and len(err.strip().splitlines()) == 1
    assert "--workdir must be a folder that can be written" in err


def test_workdir_with_other_files_or_another_run(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    status, _, err = invoke(capsys, f"--workdir={tmp_path}")
    assert status == 2 and "--workdir must be empty or hold this very run" in err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    run = tmp_path / "run"
    assert invoke(capsys, f"--workdir={run}", *SMALL, "--max_steps=1")[0] == 0
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    status, _, err = invoke(capsys, f"--workdir={run}", *SMALL, "--max_steps=1", "--factor=0.5")
    assert status == 2 and len(err.strip().splitlines()) == 1 and "factor=" in err and "0.5 here" in err
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == before


def test_list_recipes_and_help(capsys):
    status, out, _ = invoke(capsys, "--list_recipes")
    assert status == 0
    for name in ("digits", "plain44_cifar10", "plain110_cifar10_short_l2", "resnet110_cifar10"):
        assert f"\n{name}\n" in f"\n{out}"
    assert "paper: 81.6" in out and "\n    measured on a JPEG copy: " in out
    out = subprocess.run([sys.executable, ROOT / "train.py", "--help"], capture_output=True, text=True).stdout
    for flag in ("--factor", "--modulation", "--recipe", "--workdir", "--strategy"):
        assert flag in out


def test_non_finite_loss_stops_with_a_message(tmp_path, capsys):
    status, _, err = invoke(capsys, f"--workdir={tmp_path}", *SMALL, "--learning_rate=1e30", "--schedule=constant")
    assert status == 1 and len(err.strip().splitlines()) == 1
    assert "the loss became" in err and "at step" in err and "--learning_rate" in err
    assert not (tmp_path / "result.json").exists()


def folder_of_images(root):
    """Two classes of 8x8 images: dark and light."""
    rng = np.random.default_rng(0)
    for label, base in (("dark", 40), ("light", 200)):
        (root / label).mkdir(parents=True)
        for index in range(30):
            pixels = np.clip(rng.normal(base, 20, (8, 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / label / f"{index}.png")


def test_a_folder_of_images_is_learned(tmp_path, capsys):
    folder_of_images(tmp_path / "images")
    status, out, err = invoke(
        capsys, f"--dataset=folder:{tmp_path / 'images'}", f"--workdir={tmp_path}/run", "--image_size=0", "--depth=8",
        "--batch_size=16", "--epochs=12", "--learning_rate=0.03", "--warmup_steps=0", "--augment=crop_flip",
    )  # fmt: skip
    assert status == 0 and err == "", err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert "images (8, 8, 3), 2 classes" in out and "test accuracy with mirror images 1.0000" in out
    assert result["test_accuracy"] == result["test_mirrored_accuracy"] == 1


KILLED = (
    "--image_size=0",
    "--depth=14",
    "--width=8",
    "--epochs=6",
    "--batch_size=64",
    "--learning_rate=0.01",
    "--deterministic",
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    process = start(f"--workdir={workdir}", *KILLED)
    assert process.communicate()[1] == "" and process.returncode == 0
    return workdir


def assert_same_figures(mine, expected):
    if isinstance(expected, dict):
        assert mine.keys() == expected.keys()
        for key in expected.keys() - {"seconds", "images/s", "images_per_second"}:
            assert_same_figures(mine[key], expected[key])
    elif isinstance(expected, list):
        assert len(mine) == len(expected)
        for pair in zip(mine, expected):
            assert_same_figures(*pair)
    else:
        assert mine == (pytest.approx(expected, rel=1e-5, abs=1e-6) if isinstance(expected, float) else expected)


def assert_same_run(workdir, whole):
    """Two runs ended with the same figures and weights; how long each took may differ."""
    for name in ("result.json", "history.json"):
        assert_same_figures(*(json.loads((folder / name).read_text()) for folder in (workdir, whole)))
    weights = (keras.models.load_model(folder / "final.keras").get_weights() for folder in (workdir, whole))
    for mine, expected in zip(*weights):
        np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("signum", "line"), [(signal.SIGKILL, "epoch 3/6"), (signal.SIGTERM, "epoch 2/6")])
def test_a_run_that_was_stopped_goes_on_and_ends_the_same(tmp_path, uninterrupted, signum, line):
    workdir = tmp_path / "run"
    process = start(f"--workdir={workdir}", *KILLED)
    wait_for_line(process, line)
    time.sleep(0.05)
    os.kill(process.pid, signum)
    _, err = process.communicate()
    assert process.returncode == (-signum if signum == signal.SIGKILL else 128 + signum)
    if signum == signal.SIGTERM:
        assert "stopped after step" in err and len(err.strip().splitlines()) == 1
    assert not (workdir / "result.json").exists()
    process = start(f"--workdir={workdir}", *KILLED)
    out, err = process.communicate()
    assert process.returncode == 0 and err == "" and "resuming after step" in out
    assert_same_run(workdir, uninterrupted)


def test_a_finished_run_is_not_done_again(uninterrupted, capsys):
    before = (uninterrupted / "result.json").stat().st_mtime_ns
    status, out, _ = invoke(capsys, f"--workdir={uninterrupted}", *KILLED)
    assert status == 0 and "finished already" in out
    assert (uninterrupted / "result.json").stat().st_mtime_ns == before


def test_deterministic_runs_are_equal_to_the_bit(tmp_path, uninterrupted):
    process = start(f"--workdir={tmp_path / 'run'}", *KILLED)
    assert process.communicate()[1] == "" and process.returncode == 0
    weights = (keras.models.load_model(folder / "final.keras").get_weights() for folder in (tmp_path / "run", uninterrupted))
    for mine, expected in zip(*weights):
        np.testing.assert_array_equal(mine, expected)


def test_input_size_is_image_size_and_the_recipe_fits_the_depth():
    with flagsaver.flagsaver():
        train.parse_flags(["train.py", "--recipe=digits", "--depth=1004", "--input_size=8"])
        recipe, _, given = train.recipe_from_flags()
    assert given == {"depth": 1004, "image_size": 8}
    assert (recipe.initializer, recipe.relu_shift) == ("dirac", 1)
    assert recipe.peak_learning_rate == pytest.approx(0.03 * 44 / 1004)
