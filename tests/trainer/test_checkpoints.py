import io
import json
import pathlib
import zipfile

import keras
import numpy as np
import pytest

from ortho_keras.method.errors import InputError
from ortho_keras.trainer.checkpoints import restore_checkpoint, save_checkpoint, state_variables
from ortho_keras.trainer.recipe import Recipe
from ortho_keras.trainer.run import run

HISTORY = [[{"epoch": 1, "loss": 0.1 + 0.2}], {"steps": 3, "logs": {}, "worst": float("inf")}]

OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5), 0.9),
    "adam": lambda: keras.optimizers.Adam(0.01, amsgrad=True),
    "loss scale": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01), 2.0**4, dynamic_growth_steps=2),
}


def make_model(seed=0, optimizer="sgd", width=8):
    """A compiled model with weights, averages, the state of a dropout and an optimizer's slots."""
    keras.utils.set_random_seed(seed)
    layers = [keras.layers.Dense(width), keras.layers.BatchNormalization(), keras.layers.Dropout(0.5), keras.layers.Dense(3)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    model.compile(OPTIMIZERS[optimizer](), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.optimizer.build(model.trainable_variables)
    return model


def make_small_model():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def train(model, first, last):
    for step in range(first, last):
        rng = np.random.default_rng(step)
        model.train_on_batch(rng.normal(size=(16, 4)), rng.integers(0, 3, 16))


def state(model):
    return [np.array(variable.numpy()) for variable in state_variables(model)]


def fill(model, value):
    """Sets all of a model's state to one value, so that what a checkpoint holds tells which one it is."""
    for variable in state_variables(model):
        variable.assign(np.full(variable.shape, value))


def assert_state(model, expected):
    found = state(model)
    for value, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(value, other, strict=True)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def pair(tmp_path):
    """A model, and a directory with two checkpoints of it: all ones after step 1, all twos after step 2."""
    model = make_small_model()
    for step in (1, 2):
        fill(model, step)
        save_checkpoint(tmp_path, model, step, [step])
    return model, tmp_path, tmp_path / "step-000000002.npz"


def restored(model, directory):
    """What a restoring into a model of all nines gives back, the value that its state then has, and the log."""
    fill(model, 9)
    log = []
    result = restore_checkpoint(directory, model, log.append)
    held = {float(value) for array in state(model) for value in array.flat}
    assert len(held) == 1  # never a part of one checkpoint and a part of another
    return result, held.pop(), log


def assert_fell_back(model, directory):
    """The newest checkpoint was named and left aside."""
    result, value, log = restored(model, directory)
    assert (result, value) == ((1, [1]), 1)
    assert len(log) == 1 and "step-000000002.npz" in log[0] and "\n" not in log[0]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_goes_on_as_if_it_had_not_been_stopped(tmp_path, optimizer):
    if optimizer == "loss scale":
        keras.config.set_dtype_policy("mixed_float16")
    model = make_model(0, optimizer)
    train(model, 0, 5)
    save_checkpoint(tmp_path, model, 5, HISTORY)
    saved = state(model)
    train(model, 5, 9)
    other = make_model(1, optimizer)
    assert restore_checkpoint(tmp_path, other) == (5, HISTORY)
    assert_state(other, saved)
    train(other, 5, 9)
    assert_state(other, state(model))
    assert model.optimizer.iterations == other.optimizer.iterations == 9
    assert any(np.any(a != b) for a, b in zip(saved, state(model)))


def test_state_holds_all_that_training_changes():
    keras.config.set_dtype_policy("mixed_float16")
    model = make_model(0, "loss scale")
    paths = " ".join(variable.path for variable in state_variables(model))
    for part in ("kernel", "moving_mean", "seed_generator_state", "iteration", "momentum", "dynamic_scale", "step_counter"):
        assert part in paths
    variables = state_variables(model)
    assert len({id(variable) for variable in variables}) == len(variables)


def test_loss_scale_is_restored(tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    model = make_model(0, "loss scale")
    model.train_on_batch(np.full((16, 4), np.inf), np.zeros(16))  # not finite: halves the scale
    save_checkpoint(tmp_path, model, 1, [])
    other = make_model(1, "loss scale")
    restore_checkpoint(tmp_path, other)
    assert float(other.optimizer.dynamic_scale) == 2.0**3


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_ones_are_kept(tmp_path, keep):
    model = make_small_model()
    for step in (9, 10, 99, 100, 1000):
        fill(model, step)
        save_checkpoint(tmp_path / "new" / "folder", model, step, [step], **({} if keep == 2 else {"keep": keep}))
    steps = [9, 10, 99, 100, 1000][-keep:]
    assert names(tmp_path / "new" / "folder") == [f"step-{step:09d}.npz" for step in steps]
    assert restored(model, tmp_path / "new" / "folder") == ((1000, [1000]), 1000, [])


def test_a_checkpoint_replaces_one_of_the_same_step(pair):
    model, directory, newest = pair
    newest.write_bytes(b"damaged")
    fill(model, 7)
    save_checkpoint(directory, model, 2, ["again"])
    assert restored(model, directory) == ((2, ["again"]), 7, [])


def test_no_checkpoint(tmp_path):
    model = make_small_model()
    (tmp_path / "empty").mkdir()
    for directory in (tmp_path / "empty", tmp_path / "missing", str(tmp_path / "missing")):
        assert restored(model, directory) == (None, 9, [])
    assert names(tmp_path) == ["empty"]


def test_truncated_checkpoint(pair):
    model, directory, newest = pair
    whole = newest.read_bytes()
    for length in (*range(0, len(whole), 29), len(whole) - 1):
        newest.write_bytes(whole[:length])
        assert_fell_back(model, directory)


@pytest.mark.parametrize("mask", [0x01, 0xFF])
def test_flipped_bits(pair, mask):
    model, directory, newest = pair
    whole, damaged = newest.read_bytes(), 0
    for at in range(3, len(whole), 7):
        newest.write_bytes(whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :])
        if restored(model, directory) != ((2, [2]), 2, []):  # a date or the like: nothing of ours is damaged
            assert_fell_back(model, directory)
            damaged += 1
    assert damaged > len(whole) / 7 / 2


def test_every_number_is_guarded(pair):
    model, directory, newest = pair
    whole = newest.read_bytes()
    with zipfile.ZipFile(newest) as file:
        entries = file.infolist()
    assert len(entries) == len(state_variables(model)) + 1
    for entry in entries:
        last = whole.index(entry.filename.encode(), entry.header_offset) + len(entry.filename)
        last += int.from_bytes(whole[entry.header_offset + 28 : entry.header_offset + 30], "little") + entry.file_size - 1
        newest.write_bytes(whole[:last] + bytes([whole[last] ^ 0x40]) + whole[last + 1 :])
        assert_fell_back(model, directory)


def npy_file(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"garbage" * 1000, bytes(2000), b"PK\x03\x04", b"PK\x05\x06" + bytes(18), npy_file(np.ones(3))]
)
def test_a_file_that_is_no_checkpoint(pair, content):
    model, directory, newest = pair
    newest.write_bytes(content)
    assert_fell_back(model, directory)


def test_a_folder_in_the_place_of_a_checkpoint(pair):
    model, directory, newest = pair
    newest.unlink()
    newest.mkdir()
    assert_fell_back(model, directory)


@pytest.mark.parametrize("change", ["history", "array", "text"])
def test_a_checkpoint_with_a_part_missing_or_wrong(pair, change):
    model, directory, newest = pair
    with np.load(newest) as file:
        arrays = dict(file)
    if change == "text":
        arrays["history"] = np.array("{not JSON")
    else:
        del arrays["history" if change == "history" else max(set(arrays) - {"history"})]
    np.savez(newest, **arrays)
    assert_fell_back(model, directory)


class Trap:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("which", ["history", "an array"])
def test_nothing_is_unpickled(pair, which):
    model, directory, newest = pair
    with np.load(newest) as file:
        arrays = dict(file)
    name = "history" if which == "history" else max(set(arrays) - {"history"})
    arrays[name] = np.array(Trap(directory / "sprung"), dtype=object)
    np.savez(newest, **arrays)
    assert_fell_back(model, directory)
    assert not (directory / "sprung").exists()


def test_all_checkpoints_damaged(pair):
    model, directory, _ = pair
    for path in directory.iterdir():
        path.write_bytes(path.read_bytes()[:-10])
    result, value, log = restored(model, directory)
    assert (result, value) == (None, 9)
    assert len(log) == 2 and "step-000000002.npz" in log[0] and "step-000000001.npz" in log[1]


@pytest.mark.parametrize("keep", [1, 2])
def test_what_could_not_be_used_gives_way_to_what_is_written_next(tmp_path, keep):
    model = make_small_model()
    for step in (100, 200):
        save_checkpoint(tmp_path, model, step, HISTORY, keep=2)
        path = tmp_path / f"step-{step:09d}.npz"
        path.write_bytes(path.read_bytes()[:-30])
    assert restore_checkpoint(tmp_path, model, log=lambda line: None) is None
    for step in (20, 40):
        fill(model, step)
        save_checkpoint(tmp_path, model, step, HISTORY, keep=keep)
        fill(model, 0)
        assert restore_checkpoint(tmp_path, model)[0] == step and np.all(state(model)[0] == step)
    assert names(tmp_path) == [f"step-{step:09d}.npz" for step in (20, 40)][-keep:]


def test_a_checkpoint_of_another_model(tmp_path):
    save_checkpoint(tmp_path, make_model(width=8), 1, [])
    for other in (make_model(width=9), make_model(optimizer="adam")):
        before, log = state(other), []
        assert restore_checkpoint(tmp_path, other, log.append) is None
        assert "step-000000001.npz" in log[0] and "another model" in log[0]
        assert_state(other, before)


def test_other_files_are_left_alone(pair):
    model, directory, _ = pair
    others = ["step-000000003.partial", "step-3.npz", "step-000000003.npz.bak", "best.npz", "notes.txt"]
    for name in others:
        (directory / name).write_bytes(b"something else")
    assert restored(model, directory) == ((2, [2]), 2, [])
    fill(model, 3)
    save_checkpoint(directory, model, 3, [3])  # over a leftover of its own
    assert names(directory) == sorted([*others[1:], "step-000000002.npz", "step-000000003.npz"])
    assert restored(model, directory) == ((3, [3]), 3, [])


@pytest.mark.parametrize("room", [0, 300, 1000])
def test_a_write_that_fails_leaves_the_one_before_it(pair, room):
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


def test_checkpoints_hold_numbers_and_one_text(tmp_path):
    model = make_model()
    save_checkpoint(tmp_path, model, 1, HISTORY)
    with np.load(tmp_path / "step-000000001.npz", allow_pickle=False) as file:
        kinds = {name: file[name].dtype.kind for name in file.files}
    assert kinds.pop("history") == "U"
    assert len(kinds) == len(state_variables(model)) and set(kinds.values()) <= set("fiu")


def test_a_run_on_other_images_is_not_taken_up(tmp_path):
    recipe = Recipe(depth=8, width=2, epochs=1)
    held = json.dumps({"recipe": recipe.to_json(), "data_sha256": "0123456789abcdef" * 4})
    (tmp_path / "run.json").write_text(held)
    with pytest.raises(InputError, match=r"whose images are others \(data_sha256 0123456789abcdef there, [0-9a-f]{16} here\)"):
        run(recipe, tmp_path, log=lambda line: None)
    assert (tmp_path / "run.json").read_text() == held
