"""A net that grows computes what it did: against the shallower net, against statistics taken by hand, and in whole runs."""

import dataclasses
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from PIL import Image
from test_experiment import StopAt

from ortho_keras import BatchNormalizationEstimator, ErrorModulation, callbacks, grow, modulate, plain_cnn, plain_imagenet
from ortho_keras.callbacks import read_signals, steps_taken
from ortho_keras.errors import Interrupted
from ortho_keras.experiment import run
from ortho_keras.recipes import find_preset
from ortho_keras.runtime import Runtime

RECIPE = dataclasses.replace(
    find_preset("digits").recipe,
    image_size=0,
    width=4,
    start_depth=8,
    grow_epoch=2,
    depth=20,
    epochs=4,
    batch_size=128,
    learning_rate=0.02,
    warmup_steps=0,
)


def disturbed(model, rng):
    """A model as if it had been trained: no trainable weight is what it was at the start."""
    for variable in model.trainable_variables:
        spread = 0.3 if variable.path.endswith(("gamma", "beta")) else 0.1
        variable.assign(variable + spread * rng.normal(size=variable.shape))
    return model


def outputs(model, x, training=False):
    return np.asarray(model(x, training=training), np.float64)


@pytest.mark.parametrize("seed", range(6))
def test_outputs_and_penalty_stay_what_they_were(seed):
    rng = np.random.default_rng(seed)
    few = int(rng.integers(1, 4))
    many = few + int(rng.integers(1, 5))
    settings = {
        "input_shape": (int(rng.integers(7, 13)), int(rng.integers(7, 13)), int(rng.integers(1, 5))),
        "width": int(rng.integers(1, 7)),
        "relu_shift": float(rng.choice([0.0, 0.7, 2.0])),
        "initializer": str(rng.choice(["orthonormal", "dirac", "he_normal"])),
        "num_classes": int(rng.integers(2, 7)),
    }
    model, deeper = plain_cnn(6 * few + 2, **settings, seed=seed), plain_cnn(6 * many + 2, **settings, seed=seed + 1)
    disturbed(model, rng)
    x = rng.normal(size=(int(rng.integers(16, 64)), *settings["input_shape"])).astype("float32")
    BatchNormalizationEstimator(model)([x])
    before = model.get_weights()
    grow(model, deeper, x)
    for mine, expected in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(mine, expected)
    new = rng.normal(size=(5, *settings["input_shape"])).astype("float32")
    np.testing.assert_allclose(outputs(deeper, new), outputs(model, new), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(outputs(deeper, x, True), outputs(model, x, True), rtol=2e-3, atol=2e-3)
    assert float(sum(deeper.losses)) == pytest.approx(float(sum(model.losses)), rel=1e-4, abs=1e-7)


def test_where_the_new_layers_are_and_what_they_hold():
    rng = np.random.default_rng(0)
    model, deeper = (plain_cnn(depth, (8, 8, 3), width=4, relu_shift=1.0) for depth in (14, 32))
    x = rng.normal(size=(40, 8, 8, 3)).astype("float32")
    disturbed(model, rng)
    BatchNormalizationEstimator(model)([x])
    grow(model, deeper, x)
    old = {
        "stem_conv": "stem_conv",
        "classifier": "classifier",
    }  # 4 convolutions among 10, with one that strides 1 + 3 among 1 + 9
    old |= {f"stage1_conv{mine:02d}": f"stage1_conv{theirs:02d}" for mine, theirs in zip((1, 3, 6, 8), (1, 2, 3, 4))}
    for stage in (2, 3):
        old |= {
            f"stage{stage}_conv{mine:02d}": f"stage{stage}_conv{theirs:02d}" for mine, theirs in zip((1, 2, 5, 8), (1, 2, 3, 4))
        }
    came_from = None
    for layer in deeper.layers:
        if layer.name in old:
            came_from = old[layer.name]
            for mine, expected in zip(layer.get_weights(), model.get_layer(came_from).get_weights(), strict=True):
                np.testing.assert_array_equal(mine, expected)
        elif isinstance(layer, layers.Conv2D):
            kernel = np.zeros(layer.kernel.shape)
            kernel[1, 1] = np.eye(kernel.shape[-1])
            np.testing.assert_array_equal(layer.kernel, kernel)
            coming = outputs(keras.Model(model.input, model.get_layer(f"{came_from}_relu").output), x)
            gamma, beta, mean, variance = deeper.get_layer(f"{layer.name}_bn").get_weights()
            np.testing.assert_allclose(mean, coming.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(variance, coming.var((0, 1, 2)), rtol=1e-4)
            np.testing.assert_array_equal(beta, mean)
            np.testing.assert_allclose(gamma, np.sqrt(variance + 1e-5), rtol=1e-6)


def mlp(count, activation="relu", units=6, bias=True):
    hidden = [layers.Dense(units, activation=activation, use_bias=bias) for _ in range(count)]
    return keras.Sequential([keras.Input((6,)), *hidden, layers.Dense(3)])


def mixed_chain(counts):
    """Convolutions of rank 1, with an activation of their own and with a bias, also of one pixel without padding."""
    first, second, third = counts
    net = [keras.Input((9, 4))]
    net += [layers.Conv1D(4, 4, padding="same", activation="relu") for _ in range(first)]
    net += [layers.Conv1D(4, 3, strides=2, activation="relu")]
    net += [layers.Conv1D(4, 1, activation="relu") for _ in range(second)]
    net += [layers.Flatten(), *(layers.Dense(16, activation="relu") for _ in range(third)), layers.Dense(2)]
    return keras.Sequential(net)


def test_dense_layers_and_other_convolutions_grow():
    rng = np.random.default_rng(3)
    model, deeper = disturbed(mixed_chain((1, 2, 1)), rng), mixed_chain((4, 3, 3))
    x = rng.normal(size=(20, 9, 4)).astype("float32")
    grow(model, deeper, x)
    np.testing.assert_allclose(outputs(deeper, x), outputs(model, x), rtol=1e-5, atol=1e-6)
    assert np.abs(outputs(model, x)).max() > 0.1


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision(precision):
    keras.config.set_dtype_policy(precision)
    rng = np.random.default_rng(1)
    model, deeper = (plain_cnn(depth, (8, 8, 3), width=4, relu_shift=1.0) for depth in (8, 44))
    x = rng.normal(size=(64, 8, 8, 3)).astype("float32")
    BatchNormalizationEstimator(disturbed(model, rng))([x])
    grow(model, deeper, x)
    np.testing.assert_array_equal(outputs(deeper, x), outputs(model, x))  # what was rounded once is rounded to the same again


def test_modulated_nets_and_photographs_grow():
    rng = np.random.default_rng(2)
    model, deeper = (modulate(plain_cnn(depth, (8, 8, 3), width=2)) for depth in (8, 14))
    x = rng.normal(size=(16, 8, 8, 3)).astype("float32")
    grow(model, deeper, x)
    np.testing.assert_allclose(outputs(deeper, x), outputs(model, x), rtol=1e-4, atol=1e-5)
    model, deeper = (plain_imagenet(depth, (32, 32, 3), num_classes=4, width=2) for depth in (34, 44))
    x = rng.normal(size=(16, 32, 32, 3)).astype("float32")
    BatchNormalizationEstimator(model)([x])
    grow(model, deeper, x)
    np.testing.assert_allclose(outputs(deeper, x), outputs(model, x), rtol=1e-4, atol=1e-4)


def pooled(first, second):
    block = {"filters": 4, "kernel_size": 3, "padding": "same", "activation": "relu"}
    net = [keras.Input((8, 8, 4)), *(layers.Conv2D(**block) for _ in range(first)), layers.MaxPooling2D()]
    net += [*(layers.Conv2D(**block) for _ in range(second)), layers.Flatten(), layers.Dense(16, "relu"), layers.Dense(16)]
    return keras.Sequential(net)


@pytest.mark.parametrize(("few", "many"), [((2, 3), (3, 4)), ((1, 1), (3, 1)), ((1, 2), (1, 5))])
def test_runs_end_at_a_pooling_and_at_another_activation(few, many):
    rng = np.random.default_rng(4)
    model, deeper = disturbed(pooled(*few), rng), pooled(*many)
    x = rng.normal(size=(50, 8, 8, 4)).astype("float32")  # more than are compared at a time
    grow(model, deeper, tf.constant(x))
    np.testing.assert_allclose(outputs(deeper, x), outputs(model, x), rtol=1e-5, atol=1e-5)


def test_a_layer_that_is_called_by_keyword():
    inputs = keras.Input((6,))
    hidden = inputs
    for _ in range(3):
        hidden = layers.Dense(6, "relu")(inputs=hidden)
    deeper, model = keras.Model(inputs, layers.Dense(3)(hidden)), disturbed(mlp(1), np.random.default_rng(0))
    x = np.random.default_rng(1).normal(size=(9, 6)).astype("float32")
    grow(model, deeper, x)
    np.testing.assert_allclose(outputs(deeper, x), outputs(model, x), rtol=1e-6)


def two_outputs():
    inputs = keras.Input((6,))
    return keras.Model(inputs, {"a": layers.Dense(3)(inputs)})


def without_scale(count):
    block = [layer for _ in range(count) for layer in (layers.Dense(6), layers.BatchNormalization(scale=False), layers.ReLU())]
    return keras.Sequential([keras.Input((6,)), *block, layers.Dense(3)])


@pytest.mark.parametrize(
    ("model", "deeper", "expected"),
    [
        (mlp(1, "gelu"), mlp(2, "gelu"), "`deeper` must compute what `model` does"),
        (mlp(2), mlp(1), "Received: 1 layer.s. from 'dense.*' on, Dense {.*} are in `deeper`, where 2 layer"),
        (mlp(1, "tanh"), mlp(2, "tanh"), "`deeper` must compute what `model` does"),
        (two_outputs(), mlp(2), "`model` must have one input and one output"),
        (mlp(1), mlp(2).layers[0], "`deeper` must be a built Keras model"),
        (keras.Sequential([layers.Dense(6)]), mlp(2), "`model` must be a built Keras model"),
        (mlp(1), mlp(2, units=7), "`deeper` must have the layers of `model` in their order"),
        (mlp(1, units=7), mlp(1, units=7, bias=False), "`deeper` must have the layers of `model` in their order"),
        (without_scale(1), without_scale(2), "must have gamma and beta. Received: dense"),
    ],
)
def test_what_cannot_grow_is_refused_and_nothing_changes(model, deeper, expected):
    if expected == "`deeper` must compute what `model` does":
        disturbed(model, np.random.default_rng(1))
    before = deeper.get_weights()
    with pytest.raises(ValueError, match=expected):
        grow(model, deeper, np.random.default_rng(0).normal(size=(8, 6)).astype("float32"))
    for mine, was in zip(deeper.get_weights(), before, strict=True):
        np.testing.assert_array_equal(mine, was)


@pytest.mark.parametrize("x", [np.zeros((0, 6)), [[0.0] * 6], {"a": np.zeros((2, 6))}, None, np.float32(1)])
def test_what_is_no_batch_is_refused(x):
    with pytest.raises(ValueError, match="`x` must be an array or a tensor of at least one input. Received"):
        grow(mlp(1), mlp(2), x)


@pytest.mark.parametrize("settings", [{"strides": 2}, {"padding": "valid"}, {"groups": 2}])
def test_a_layer_that_shrinks_or_groups_is_no_identity(settings):
    settings = {"padding": "same", **settings}

    def net(count):
        return keras.Sequential(
            [keras.Input((32, 2)), *(layers.Conv1D(2, 3, **settings) for _ in range(count)), layers.Flatten()]
        )

    with pytest.raises(ValueError, match="Each layer that only `deeper` has must be a convolution or Dense"):
        grow(net(1), net(2), np.zeros((4, 32, 2), "float32"))


@pytest.mark.parametrize(
    ("precision", "modulation", "relu_shift", "stops"),
    [("float32", "anchor", -1.0, (3, 18, 27)), ("mixed_float16", "off", 1.0, (13, 22))],
)
def test_a_growing_run_and_one_stopped_in_both_nets_are_the_same(tmp_path, precision, modulation, relu_shift, stops):
    recipe = dataclasses.replace(RECIPE, precision=precision, modulation=modulation, relu_shift=relu_shift)
    finals, histories = [], []
    for name, points in (("whole", ()), ("stopped", stops)):  # 18 is seen in step 20, after which it grows
        lines = []
        for step in points:
            with pytest.raises(Interrupted, match=f"stopped after step {step + 2} of 40"):
                run(recipe, tmp_path / name, callbacks=[StopAt(step, False)], log=lines.append)
        result = run(recipe, tmp_path / name, log=lines.append)
        assert lines.count("plain8 has become plain20") == 1 and not any("cannot be used" in line for line in lines)
        finals.append(keras.models.load_model(tmp_path / name / "final.keras"))
        histories.append(json.loads((tmp_path / name / "history.json").read_text()))
    for mine, expected in zip(*(final.get_weights() for final in finals), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-3, atol=1e-5)
    for row, expected in zip(*histories, strict=True):
        assert row["accuracy"] == pytest.approx(expected["accuracy"], abs=1e-6)
    history = histories[0]
    assert [row["step"] for row in history] == [10, 20, 30, 40] and result["steps"] == 40
    # Half a cosine over all steps, at the rate of each depth: 0.02 * 44 / 8, then 0.02 * 44 / 20.
    share = [0.5 * (1 + np.cos(np.pi * step / 40)) for step in (10, 20, 30, 40)]
    rates = np.array([5.5, 5.5, 2.2, 2.2]) * 0.02 * share
    np.testing.assert_allclose([row["learning_rate"] for row in history], rates, rtol=1e-5, atol=1e-9)
    assert sum(isinstance(layer, layers.Conv2D) for layer in finals[0].layers) == 19
    assert history[2]["crossentropy"] < history[1]["crossentropy"]  # nothing was lost


def test_a_run_that_ends_early_still_gives_the_net_that_was_asked_for(tmp_path):
    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = True

    result = run(RECIPE, tmp_path, callbacks=[Stop()], log=lambda line: None)
    assert result["steps"] == 10
    final = keras.models.load_model(tmp_path / "final.keras")
    assert final.name == "plain20"
    kernels = [layer.kernel for layer in final.layers if isinstance(layer, layers.Conv2D)]
    ones = [tf.reduce_sum(tf.abs(kernel)) == kernel.shape[-1] for kernel in kernels]
    assert sum(bool(one) for one in ones) == 12


def test_callbacks_see_the_net_that_trains(tmp_path, monkeypatch):
    seen, maps = [], []
    monkeypatch.setattr(callbacks, "plot_heat_map", lambda steps, names, *rest: maps.append((steps, names)))

    class Watch(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            enabled = {layer.enabled for layer in self.model.layers if isinstance(layer, ErrorModulation)}
            seen.append((self.model.name, steps_taken(self.model), enabled))

    recipe = dataclasses.replace(RECIPE, modulation="anchor", modulation_steps=15)
    run(recipe, tmp_path, callbacks=[Watch()], signal_every=15, log=lambda line: None)
    assert seen == [("plain8", 10, {True}), ("plain8", 20, {False}), ("plain20", 30, {False}), ("plain20", 40, {False})]
    rows = read_signals(tmp_path / "signals.csv")
    names = {step: [row["name"] for row in rows if row["step"] == step] for step in {row["step"] for row in rows}}
    assert {step: len(of_step) for step, of_step in names.items()} == {0: 8, 15: 8, 20: 20, 35: 20, 40: 20}
    assert all(of_step[0] == "stem_conv" and of_step[-1] == "classifier" for of_step in names.values())
    assert [steps for steps, _ in maps] == [[0, 15, 20], [0, 15, 20, 35, 40]]
    assert maps[0][1] == names[15] and maps[1][1] == names[40]  # in the order of the net as it is then


def test_adam_begins_anew_where_the_net_has_grown(tmp_path):
    """Its first steps are no longer than the rate, which they are where moments at 0 meet a count of steps that is not."""
    longest = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.before = self.model.get_weights()

        def on_train_batch_end(self, batch, logs=None):
            moved = [np.abs(v - w).max() for v, w in zip(self.model.trainable_variables, self.trainable_before())]
            longest.append(max(moved) / float(self.model.optimizer.learning_rate))

        def trainable_before(self):
            return [w for v, w in zip(self.model.weights, self.before) if any(v is t for t in self.model.trainable_variables)]

    recipe = dataclasses.replace(RECIPE, optimizer="adam", learning_rate=0.001, rate_depth=0, schedule="constant", max_steps=30)
    run(dataclasses.replace(recipe, epochs=3), tmp_path, callbacks=[Watch()], log=lambda line: None)
    assert len(longest) == 30 and 0.9 < longest[20] < 1.01 and max(longest[20:]) < 2


def test_the_new_layers_see_images_of_all_classes(tmp_path):
    """A folder's images are in the order of its classes."""
    rng = np.random.default_rng(0)
    for label, level in enumerate((40, 120, 200)):
        folder = tmp_path / "data" / str(label)
        folder.mkdir(parents=True)
        for number in range(60):
            pixels = np.clip(rng.normal(level, 30, size=(8, 8)), 0, 255).astype("uint8")
            Image.fromarray(pixels).save(folder / f"{number}.png")
    recipe = dataclasses.replace(
        RECIPE, dataset=f"folder:{tmp_path / 'data'}", batch_size=16, grow_epoch=3, epochs=4, learning_rate=1e-6, rate_depth=0
    )
    run(recipe, tmp_path / "run", log=lambda line: None)
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert history[3]["crossentropy"] == pytest.approx(history[2]["crossentropy"], abs=0.1)


def test_a_run_grows_on_two_replicas_as_on_one(tmp_path, two_replicas):
    recipe = dataclasses.replace(RECIPE, depth=14, grow_epoch=1, epochs=2)
    for name, runtime in (("one", Runtime()), ("two", Runtime(two_replicas))):
        run(recipe, tmp_path / name, runtime=runtime, log=lambda line: None)
    one, two = (json.loads((tmp_path / name / "history.json").read_text()) for name in ("one", "two"))
    for mine, expected in zip(one, two, strict=True):
        assert mine["crossentropy"] == pytest.approx(expected["crossentropy"], rel=1e-3)


def test_a_damaged_checkpoint_of_the_deep_net_gives_way_to_the_shallow_one(tmp_path):
    with pytest.raises(Interrupted):
        run(RECIPE, tmp_path, callbacks=[StopAt(22, False)], keep_checkpoints=1, log=lambda line: None)
    (newest,) = (tmp_path / "checkpoints").glob("*.npz")
    newest.write_bytes(newest.read_bytes()[:1000])
    lines = []
    result = run(RECIPE, tmp_path, log=lines.append)
    assert sum("cannot be used" in line for line in lines) == 1 and "plain8 has become plain20" in lines
    assert "resuming after step 20 of 40" in lines and result["steps"] == 40
