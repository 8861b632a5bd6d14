"""Checkpoints: training resumes as if it had not been stopped, and damage of any kind falls back to the previous one."""

import json
import pathlib

import keras
import numpy as np
import pytest

from ortho_keras.trainer.checkpoints import restore_checkpoint, save_checkpoint, state_variables
from ortho_keras.trainer.loop import HISTORY as HISTORY_FORM
from ortho_keras.trainer.loop import new_epoch

HISTORY = [[{"epoch": 1, "loss": 0.1 + 0.2}], {"steps": 3, "logs": {}, "worst": float("inf")}]
PARTS = ("kernel", "moving_mean", "seed_generator_state", "iteration", "momentum", "dynamic_scale", "step_counter")


def make_model(seed=0, width=8):
    """A compiled model with weights, averages, the state of a dropout, an optimizer's slots and a loss scale."""
    keras.config.set_dtype_policy("mixed_float16")
    keras.utils.set_random_seed(seed)
    layers = [keras.layers.Dense(width), keras.layers.BatchNormalization(), keras.layers.Dropout(0.5), keras.layers.Dense(3)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    optimizer = keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.01, 2, 0.5), amsgrad=True)
    optimizer = keras.optimizers.LossScaleOptimizer(optimizer, 2.0**4, dynamic_growth_steps=2)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.optimizer.build(model.trainable_variables)
    return model


@pytest.fixture(scope="module")
def small():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def train(model, first, last):
    for step in range(first, last):
        rng = np.random.default_rng(step)
        x = np.full((16, 4), np.inf) if step == 4 else rng.normal(size=(16, 4))  # not finite: halves the loss scale
        model.train_on_batch(x, rng.integers(0, 3, 16))


def state(model):
    return [np.array(variable.numpy()) for variable in state_variables(model)]


def fill(model, value):
    """Sets all of a model's state to one value, which identifies its checkpoint."""
    for variable in state_variables(model):
        variable.assign(np.full(variable.shape, value))


def assert_state(model, expected):
    for value, other in zip(state(model), expected, strict=True):
        np.testing.assert_array_equal(value, other, strict=True)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def pair(small, tmp_path):
    """A model, and a directory with two checkpoints of it: all ones after step 1, all twos after step 2."""
    for step in (1, 2):
        fill(small, step)
        save_checkpoint(tmp_path, small, step, [step])
    return small, tmp_path, tmp_path / "step-000000002.npz"


def restored(model, directory):
    """What restoring into a model of all nines returns, the value that its state then has, and the log."""
    fill(model, 9)
    log = []
    result = restore_checkpoint(directory, model, log.append)
    held = {float(value) for array in state(model) for value in array.flat}
    assert len(held) == 1  # never a part of one checkpoint and a part of another
    return result, held.pop(), log


def assert_fell_back(model, directory):
    """The newest checkpoint was logged and skipped."""
    result, value, log = restored(model, directory)
    assert (result, value) == ((1, [1]), 1)
    assert len(log) == 1 and "step-000000002.npz" in log[0] and "\n" not in log[0]


def test_training_resumes_as_if_it_had_not_been_stopped(tmp_path):
    model = make_model(0)
    variables = state_variables(model)
    assert len({id(variable) for variable in variables}) == len(variables)
    assert all(part in " ".join(variable.path for variable in variables) for part in PARTS)
    train(model, 0, 5)
    assert float(model.optimizer.dynamic_scale) == 2.0**5  # doubled twice, then halved
    save_checkpoint(tmp_path, model, 5, HISTORY)
    with np.load(tmp_path / "step-000000005.npz", allow_pickle=False) as file:
        kinds = {name: file[name].dtype.kind for name in file.files}
    assert kinds.pop("history") == "U" and len(kinds) == len(variables) and set(kinds.values()) <= set("fiu")
    saved = state(model)
    train(model, 5, 9)
    other = make_model(1)
    assert restore_checkpoint(tmp_path, other) == (5, HISTORY)
    assert_state(other, saved)
    train(other, 5, 9)
    assert_state(other, state(model))
    assert any(np.any(a != b) for a, b in zip(saved, state(model)))


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_ones_are_kept(small, tmp_path, keep):
    folder = tmp_path / "new" / "folder"
    assert restored(small, folder) == (None, 9, []) and not folder.exists()
    for step in (9, 10, 99, 100, 1000):
        fill(small, step)
        save_checkpoint(folder, small, step, [step], **({} if keep == 2 else {"keep": keep}))
    assert names(folder) == [f"step-{step:09d}.npz" for step in (9, 10, 99, 100, 1000)[-keep:]]
    assert restored(small, folder) == ((1000, [1000]), 1000, [])


@pytest.mark.parametrize("mask", [0x01, 0xFF])
def test_truncated_and_flipped_bytes(pair, mask):
    model, directory, newest = pair
    whole, damaged = newest.read_bytes(), 0
    for length in (*range(0, len(whole), 97), len(whole) - 1):
        newest.write_bytes(whole[:length])
        assert_fell_back(model, directory)
    for at in range(3, len(whole), 13):
        newest.write_bytes(whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :])
        if restored(model, directory) != ((2, [2]), 2, []):  # a date or the like: nothing of ours is damaged
            assert_fell_back(model, directory)
            damaged += 1
    assert damaged > len(whole) / 13 / 2


@pytest.mark.parametrize("content", [b"garbage" * 1000, b"PK\x03\x04", b"PK\x05\x06" + bytes(18), None])
def test_what_is_no_checkpoint(pair, content):
    model, directory, newest = pair
    newest.unlink()
    newest.mkdir() if content is None else newest.write_bytes(content)
    assert_fell_back(model, directory)


class Trap:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_a_history_of_another_shape_falls_back_to_the_previous(small, tmp_path):
    row = {"epoch": 1, "step": 2, "seconds": 0.5, "accuracy": 0.5, "penalty": 0, "validation_crossentropy": float("nan")}
    good = [[row], new_epoch()]
    deep = json.loads("[" * 900 + "]" * 900)
    wrong = [[row], {}], [[row], {**new_epoch(), "steps": "3"}], [[{**row, "seconds": None}], new_epoch()], [*good, 3], {}, deep
    save_checkpoint(tmp_path, small, 1, good, keep=9)
    for step, history in enumerate(wrong, 2):
        save_checkpoint(tmp_path, small, step, history, keep=9)
    log = []
    step, (rows, begun) = restore_checkpoint(tmp_path, small, log.append, HISTORY_FORM)
    assert (step, begun) == (1, new_epoch()) and rows[0].keys() == row.keys()
    assert len(log) == len(wrong) and not any("\n" in line for line in log)
    assert "[1].steps is '3', expected an integer" in log[-2]


@pytest.mark.parametrize("which", ["history", "array"])
@pytest.mark.parametrize("change", ["missing", "other", "pickled"])
def test_a_part_that_is_missing_other_or_pickled(pair, which, change):
    model, directory, newest = pair
    with np.load(newest) as file:
        arrays = dict(file)
    name = "history" if which == "history" else max(set(arrays) - {"history"})
    if change == "missing":
        del arrays[name]
    elif change == "pickled":
        arrays[name] = np.array(Trap(directory / "sprung"), dtype=object)
    else:
        arrays[name] = np.array("{no JSON") if which == "history" else np.ones((3, 3))
    np.savez(newest, **arrays)
    assert_fell_back(model, directory)
    assert not (directory / "sprung").exists()


@pytest.mark.parametrize("keep", [1, 2])
def test_unusable_checkpoints_are_replaced_by_what_is_written_next(small, tmp_path, keep):
    for step in (100, 200):
        save_checkpoint(tmp_path, small, step, HISTORY, keep=2)
        path = tmp_path / f"step-{step:09d}.npz"
        path.write_bytes(path.read_bytes()[:-30])
    result, value, log = restored(small, tmp_path)
    assert (result, value) == (None, 9) and ["step-000000200" in log[0], "step-000000100" in log[1]] == [True, True]
    for step in (20, 40, 40):
        fill(small, step)
        save_checkpoint(tmp_path, small, step, [step], keep=keep)
        assert restored(small, tmp_path) == ((step, [step]), step, [])
    assert names(tmp_path) == [f"step-{step:09d}.npz" for step in (20, 40)][-keep:]


def test_a_checkpoint_of_another_model(tmp_path):
    save_checkpoint(tmp_path, make_model(), 1, [])
    other = make_model(1, width=9)
    before, log = state(other), []
    assert restore_checkpoint(tmp_path, other, log.append) is None
    assert "step-000000001.npz" in log[0] and "another model" in log[0]
    assert_state(other, before)


def test_other_files_are_left_alone(pair):
    model, directory, _ = pair
    others = [".0123456789ab-step-000000003.npz", "step-3.npz", "step-000000003.npz.bak", "best.npz", "notes.txt"]
    for name in others:
        (directory / name).write_bytes(b"something else")
    assert restored(model, directory) == ((2, [2]), 2, [])
    fill(model, 3)
    save_checkpoint(directory, model, 3, [3])  # removes what a kill left
    assert names(directory) == sorted([*others[1:], "step-000000002.npz", "step-000000003.npz"])
    assert restored(model, directory) == ((3, [3]), 3, [])


@pytest.mark.parametrize("room", [0, 1000])
def test_a_write_that_fails_leaves_the_previous_one(pair, room):
    resource = pytest.importorskip("resource")
    model, directory, newest = pair
    before = newest.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        for step in (2, 3):
            with pytest.raises(OSError):
                save_checkpoint(directory, model, step, ["never"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert newest.read_bytes() == before
    assert restored(model, directory) == ((2, [2]), 2, [])
