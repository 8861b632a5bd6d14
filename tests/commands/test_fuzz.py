"""A thousand random command lines, recipe files, workdirs, checkpoints and TF_CONFIGs: a result or one line, no traceback."""

import contextlib
import copy
import functools
import io
import json
import os
import random
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import flagsaver

from ortho_keras.method.errors import InputError
from ortho_keras.trainer import command
from ortho_keras.trainer.checkpoints import restore_checkpoint, save_checkpoint
from ortho_keras.trainer.export import check_export
from ortho_keras.trainer.loop import HISTORY, new_epoch
from ortho_keras.trainer.recipe import Recipe, read_recipe
from ortho_keras.trainer.recipes import RECIPES
from ortho_keras.trainer.run import _check_workdir
from ortho_keras.trainer.runtime import _cluster, read_devices

DIGITS, RECIPE = "9" * 400, RECIPES["digits"].recipe
TEXTS = [
    "",
    "0",
    "-1",
    "1",
    "8",
    "2.5",
    "1e400",
    "-1e-400",
    "nan",
    "inf",
    DIGITS,
    f"-{DIGITS}.5",
    "9" * 5000,
    "0x10",
    "1_0",
    "٣",
    "²",
]
TEXTS += [
    "true",
    "None",
    "é",
    "a\nb",
    "\udcff",
    "\0",
    "{}",
    "a" * 300,
    "~nobody/x",
    "../..",
    "/proc/x",
    "/dev/null",
    " ",
    "-",
    "=",
]
TEXTS += [
    "digits",
    "plain44_cifar10",
    "adam",
    "muon",
    "l2",
    "anchor",
    "residual",
    "imagenet",
    "disk",
    "net.keras",
    "GPU:0,CPU:0",
]
VALUES = [
    None,
    True,
    0,
    -1,
    7,
    10**18,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "44",
    "\ud800",
    "a\nb",
    "x" * 5000,
    [],
    {},
]
VALUES += [[3], {"recipe": 3}, [[[[[[[[]]]]]]]]]
FLAGS = [*Recipe.__dataclass_fields__, "recipe", "recipe_file", "workdir", "export", "list_recipes", "devices", "no_such"]
TF_CONFIG = {"cluster": {"worker": ["a:1", "b:2"]}, "task": {"type": "worker", "index": 0}}
RESULT = {"recipe_name": "digits", "recipe": RECIPE.to_json(), "data_sha256": None, "steps": 3, "seconds": 1.5}
RESULT |= {"test_accuracy": 0.5, "validation_accuracy": None, "skipped_images": 0, "device": {"type": ["CPU"], "cpu_cores": 2}}


def changed(rng, content):
    """A copy of a JSON value in which one part has another value, is missing, or has another name."""
    content = copy.deepcopy(content)
    inside, key = [content], None
    while isinstance(inside, (dict, list)) and len(inside) and (key is None or rng.random() < 0.7):
        holder, key = inside, rng.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
        inside = holder[key]
    if rng.random() < 0.2:
        del holder[key]
    elif rng.random() < 0.2 and isinstance(holder, dict):
        holder[rng.choice(TEXTS)] = holder.pop(key)
    else:
        holder[key] = rng.choice([*VALUES, *TEXTS])
    return content


def damaged(rng, data):
    """Bytes that are cut, flipped, empty, repeated or nested deep; in a third of the cases as they were."""
    data, at = bytearray(data), rng.randrange(len(data))
    way = rng.randrange(9)
    if way < 4:
        return [data[:at], b"", data + data, b"[" * rng.choice([500, 990, 100_000])][way]
    if way < 6:
        data[at] ^= 1 << rng.randrange(8)
    return data


def command_line(rng, folder):
    """Three flags, parsed; then what is read and checked of them before anything is built."""
    given, values = [], RECIPE.to_json()
    for name in rng.sample(FLAGS, 3):
        value = values[name] if name in values and rng.random() < 0.7 else rng.choice(TEXTS)
        given.append(f"--{name}={value}" if rng.random() < 0.95 else f"--no{name}")
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err):
            command.parse_flags(["train.py", *given])
    except SystemExit as stop:
        assert stop.code == 2
        raise InputError(err.getvalue().removesuffix("\n")) from None
    recipe, name, overridden = command.recipe_from_flags()
    command.default_workdir(name, overridden)
    _check_workdir(folder / (command.FLAGS.workdir or "none"), recipe)
    if command.FLAGS.export is not None:
        check_export(command.FLAGS.export, folder / "final.keras")
    return read_devices(command.FLAGS.devices)


def recipe_file(rng, folder):
    path = folder / "recipe.json"
    path.write_bytes(damaged(rng, json.dumps(changed(rng, RESULT)).encode()))
    return read_recipe(path)


def workdir(rng, folder):
    """A finished run of which one file is damaged, is a folder, or is missing."""
    for name in ("run.json", "result.json"):
        (folder / name).write_text(json.dumps(changed(rng, RESULT) if rng.random() < 0.5 else RESULT))
    path = folder / rng.choice(["run.json", "result.json", "checkpoints", "final.keras"])
    way, data = rng.randrange(9), path.read_bytes() if path.exists() else b"x"
    path.unlink(missing_ok=True)
    if way < 6:
        path.write_bytes(damaged(rng, data))
    elif way < 7:
        path.mkdir()
    elif way < 8:
        os.mkfifo(path)
    return _check_workdir(folder, RECIPE, rng.choice([None, "0" * 64]))


@functools.cache
def net():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def checkpoint(rng, folder):
    """A checkpoint with an odd history or damaged bytes, after one that is sound."""
    history = [[{"epoch": 1, "step": 2, "seconds": 0.5, "accuracy": 0.5, "penalty": 0.1}], new_epoch()]
    save_checkpoint(folder, net(), 1, history)
    save_checkpoint(folder, net(), 2, changed(rng, history))
    path, lines = folder / "step-000000002.npz", []
    path.write_bytes(damaged(rng, path.read_bytes()))
    step, (rows, epoch) = restore_checkpoint(folder, net(), lines.append, HISTORY)
    assert all(type(row["step"]) is int and np.isfinite(row["accuracy"] + row["seconds"]) for row in rows)
    assert epoch.keys() >= new_epoch().keys() and (step == 2) == (not lines)
    if lines:
        raise InputError(f"Received: {lines[0]}")


def tf_config(rng, folder):
    os.environ["TF_CONFIG"] = (
        damaged(rng, json.dumps(changed(rng, TF_CONFIG)).encode()).decode(errors="replace").replace("\0", "")
    )
    return _cluster()


@pytest.mark.parametrize(
    ("case", "count"), [(command_line, 400), (recipe_file, 250), (workdir, 150), (checkpoint, 100), (tf_config, 100)]
)
def test_only_results_or_one_line(tmp_path, monkeypatch, case, count):
    monkeypatch.setenv("TF_CONFIG", "")
    tf.config.list_logical_devices()  # their number is fixed from now on
    results = 0
    for seed in range(count):
        rng, folder = random.Random(f"{case.__name__} {seed}"), tmp_path / str(seed)
        folder.mkdir()
        monkeypatch.chdir(folder)
        try:
            with flagsaver.flagsaver():
                case(rng, folder)
            results += 1
        except InputError as error:
            line = str(error)
            assert len(line.splitlines()) == 1 and len(line) < 9000, (seed, line)
        except BaseException as error:
            raise AssertionError(f"{case.__name__} of seed {seed}: {error!r}") from error
        shutil.rmtree(folder)
    assert 0.02 * count < results < 0.9 * count, results
