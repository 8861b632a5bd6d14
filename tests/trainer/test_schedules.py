import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from ortho_keras.trainer.schedules import LearningRate


def rates(schedule, steps):
    return [float(schedule(step)) for step in steps]


def test_step_is_divided_by_ten_at_half_and_at_three_quarters():
    schedule = LearningRate(0.5, 8, "step")
    np.testing.assert_allclose(rates(schedule, range(10)), [0.5] * 4 + [0.05] * 2 + [0.005] * 4, rtol=1e-6)


def test_thirds_are_divided_by_ten_at_a_third_and_at_two():
    schedule = LearningRate(0.5, 6, "thirds")
    np.testing.assert_allclose(rates(schedule, range(8)), [0.5] * 2 + [0.05] * 2 + [0.005] * 4, rtol=1e-6)


def test_constant_stays():
    assert rates(LearningRate(0.25, 5, "constant"), [0, 1, 4, 5, 1000]) == [0.25] * 5


def test_cosine_falls_from_the_peak_to_zero():
    schedule = LearningRate(0.5, 6, "cosine")
    expected = [0.5, (2 + math.sqrt(3)) / 8, 0.375, 0.25, 0.125, (2 - math.sqrt(3)) / 8, 0, 0, 0]
    np.testing.assert_allclose(rates(schedule, [*range(7), 7, 100]), expected, rtol=1e-6, atol=1e-8)


def test_warm_up_rises_linearly_and_multiplies_the_shape():
    expected = [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]
    np.testing.assert_allclose(rates(LearningRate(0.5, 8, "constant", 4), range(6)), expected, rtol=1e-6)
    expected = [0.1, 0.2, 0.3, 0.4, 0.05, 0.06, 0.007, 0.008, 0.009, 0.01]  # through both drops
    np.testing.assert_allclose(rates(LearningRate(1.0, 8, "step", 10), range(10)), expected, rtol=1e-6)
    expected = [(2 + math.sqrt(2)) / 4 * 2 / 3, 0.5, (2 - math.sqrt(2)) / 4, 0]
    np.testing.assert_allclose(rates(LearningRate(1.0, 4, "cosine", 3), range(1, 5)), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("total", [1, 2, 3, 5, 7, 1295, 63999, 64000, 64001, 999983, 3_000_000])
def test_drops_fall_on_the_very_step(total):
    steps = np.arange(total)
    expected = np.where(2 * steps < total, 1.0, np.where(4 * steps < 3 * total, 0.1, 0.01))  # whole numbers
    np.testing.assert_allclose(LearningRate(1.0, total, "step")(steps), expected, rtol=1e-6)
    expected = np.where(3 * steps < total, 1.0, np.where(3 * steps < 2 * total, 0.1, 0.01))
    np.testing.assert_allclose(LearningRate(1.0, total, "thirds")(steps), expected, rtol=1e-6)


@pytest.mark.parametrize("warmup_steps", [0, 1, 100, 70_000])
@pytest.mark.parametrize("shape", ["constant", "step", "cosine"])
def test_a_whole_run_equals_float64(shape, warmup_steps):
    steps = np.arange(64_000.0)
    share = np.ones(64_000)
    if shape == "step":
        share[32_000:], share[48_000:] = 0.1, 0.01
    elif shape == "cosine":
        share = (1 + np.cos(np.pi * steps / 64_000)) / 2
    expected = 0.1 * share * np.minimum((steps + 1) / max(warmup_steps, 1), 1)
    np.testing.assert_allclose(LearningRate(0.1, 64_000, shape, warmup_steps)(steps), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", ["cosine", "step", "thirds", "constant"])
def test_a_second_optimizer_goes_on_with_the_shape_and_warms_up_anew(shape):
    whole, second = LearningRate(0.5, 20, shape), LearningRate(0.5, 20, shape, 4, first_step=7)
    expected = np.array(rates(whole, range(7, 21))) * np.minimum(np.arange(1, 15) / 4, 1)
    np.testing.assert_allclose(rates(second, range(14)), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["int64", "int32", "float32"])
def test_optimizers_read_it_in_a_graph(dtype):
    schedule = LearningRate(0.5, 8, "cosine", 2)
    rate = tf.function(schedule)(tf.constant(3, dtype))
    assert rate.dtype == tf.float32 and rate.shape == ()
    assert float(rate) == float(schedule(3))


@pytest.mark.parametrize("shape", ["linear", "", None])
def test_unknown_shape(shape):
    with pytest.raises(ValueError, match="`shape` must be one of"):
        LearningRate(0.1, 100, shape)


def test_config_round_trip():
    schedule = LearningRate(0.3, 700, "cosine", 11)
    config = schedule.get_config()
    assert config == {"peak": 0.3, "total_steps": 700, "shape": "cosine", "warmup_steps": 11, "first_step": 0}
    loaded = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(schedule), safe_mode=True)
    assert type(loaded) is LearningRate and loaded.get_config() == config


def test_survives_a_saved_compiled_model(tmp_path):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(LearningRate(0.5, 8, "step", 2), 0.9), "mse")
    x, y = np.ones((4, 2)), np.ones((4, 1))
    for _ in range(5):
        model.train_on_batch(x, y)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", safe_mode=True)
    assert loaded.optimizer.get_config()["learning_rate"]["config"] == LearningRate(0.5, 8, "step", 2).get_config()
    np.testing.assert_allclose(float(loaded.optimizer.learning_rate), 0.05, rtol=1e-6)  # the drop at step 4 is behind it
    assert loaded.train_on_batch(x, y) == model.train_on_batch(x, y)
    np.testing.assert_array_equal(loaded.layers[0].kernel, model.layers[0].kernel)


def test_every_step_of_an_optimizer_has_its_rate():
    schedule = LearningRate(0.5, 4, "step", 2)
    variable = keras.Variable(np.zeros(1, "float32"))
    optimizer = keras.optimizers.SGD(schedule)
    moves = []
    for _ in range(4):
        before = float(variable.numpy()[0])
        optimizer.apply([tf.ones(1)], [variable])
        moves.append(before - float(variable.numpy()[0]))
    np.testing.assert_allclose(moves, [0.25, 0.5, 0.05, 0.005], rtol=1e-5)
