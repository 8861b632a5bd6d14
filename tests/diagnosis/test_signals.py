"""What a report says in words, of made-up layers and of small nets that are wrong in one way each."""

import math

import keras
import numpy as np
import pytest

import ortho_keras
from ortho_keras.diagnosis.signals import LayerSignal, SignalReport

LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
NOT_A_NUMBER = {field: math.nan for field in LayerSignal.__dataclass_fields__}


def layer(name, positions, magnitude, forward=1.0):
    values = {"name": name, "positions": positions, "backward_moment": magnitude**2, "forward_moment": forward, "fired": False}
    return LayerSignal(**{**NOT_A_NUMBER, **values})


def report_of(*layers, **values):
    return SignalReport("made_up", 1.0, tuple(layers), False, **values)


def dense(count, gain, width=16, **arguments):
    kernel = keras.initializers.Orthogonal(gain)
    return [keras.layers.Dense(width, kernel_initializer=kernel, **arguments) for _ in range(count)]


def first_line(*layers, shape=(16,)):
    rng = np.random.default_rng(0)
    model = keras.Sequential([keras.Input(shape), *layers, keras.layers.Dense(10)])
    x, y = rng.normal(size=(32, *shape)).astype("float32"), rng.integers(10, size=32)
    return str(ortho_keras.signal_report(model, x, y, LOGITS)).splitlines()[0].removeprefix(f"{model.name}: ")


def test_growth_and_table():
    convolutions = [layer(f"c{k}", True, 2.0 ** (6 - k)) for k in range(7)]
    report = report_of(layer("stem", True, 1e9), *convolutions, layer("top", False, 1e6))
    assert report.growth == (pytest.approx(64.0), pytest.approx(2.0), 6)
    assert report.findings == ["the error grows 2 times a layer going down: 64 over 6 layers"]
    assert len(str(report).splitlines()) == 3 + 9
    lines = str(report_of(*(layer(f"c{k}", True, 1.0) for k in range(1000)))).splitlines()[3:]
    assert len(lines) == 121 and lines[0].startswith("c999 ") and lines[-1].startswith("c0 ")
    assert lines[59].startswith("c940 ") and lines[60].startswith("... 880 layers between") and lines[61].startswith("c59 ")


def test_one_odd_layer_at_an_end_does_not_tell_for_all():
    magnitudes = np.exp(np.random.default_rng(0).normal(size=9) / 2)
    magnitudes[0] = 300 * magnitudes[-1]
    report = report_of(layer("lowest", True, 1e5), *(layer(f"c{k}", True, m) for k, m in enumerate(magnitudes)))
    design = np.stack([np.ones(9), np.arange(9)], 1)
    slope = np.linalg.lstsq(design, np.log(magnitudes), rcond=None)[0][1]
    assert report.growth == (pytest.approx(np.exp(-8 * slope)), pytest.approx(np.exp(-slope)), 8)
    steady = magnitudes.copy()
    steady[:] = 300.0 ** np.linspace(1, 0, 9) * np.array([1, 2, 1, 0.5, 1, 2, 1, 0.5, 1])
    report = report_of(layer("lowest", True, 1e5), *(layer(f"c{k}", True, m) for k, m in enumerate(steady)))
    assert report.growth == (pytest.approx(300), pytest.approx(300 ** (1 / 8)), 8)


def test_growth_is_told_of_the_kind_that_changes_most():
    calm = [layer(f"c{k}", True, 1.0) for k in range(5)]
    report = report_of(*calm, *(layer(f"d{k}", False, 3.0**k) for k in range(6)))
    assert report.growth == (pytest.approx(3.0**-4), pytest.approx(1 / 3), 4)
    assert report.findings == ["the error shrinks to 0.333 of itself a layer going down: 0.012 over 4 layers"]


def test_an_odd_layer_does_not_hide_a_growth():
    magnitudes = [2.0**k for k in range(9, 0, -1)]
    magnitudes[0] = magnitudes[-1]
    report = report_of(layer("lowest", True, 1e5), *(layer(f"c{k}", True, m) for k, m in enumerate(magnitudes)))
    slope = np.polyfit(range(9), np.log(magnitudes), 1)[0]
    assert report.growth == (pytest.approx(np.exp(-8 * slope)), pytest.approx(np.exp(-slope)), 8)


def test_layers_that_no_error_reaches_keep_their_places():
    report = report_of(*(layer(f"d{k}", False, m) for k, m in enumerate([9e9, 16.0, 0.0, 0.0, 2.0, 1.0])))
    assert report.growth == (pytest.approx(16.0), pytest.approx(2.0), 4)


def test_a_hump_between_sound_ends_is_named():
    magnitudes = [1.0, 1.0, 50.0, 5000.0, 50.0, 1.0]
    report = report_of(*(layer(f"d{k}", False, m) for k, m in enumerate(magnitudes)))
    assert report.findings == ["the error is 5e+03 times as large at 'd3' as at 'd1'"]
    linear = first_line(*dense(15, 0.3), *dense(15, 3.0))
    assert linear.startswith("the error is ") and " times as large at 'dense_" in linear


def test_a_net_that_overflows_going_up():
    line = first_line(*dense(60, 10.0))
    assert "; the activations are not finite at " in line and ", from 'dense" in line


def test_recurrent_layers_and_embeddings_are_named_as_not_measured():
    inputs = keras.Input((5,), dtype="int32")
    x = keras.layers.LSTM(4, name="lstm")(keras.layers.Embedding(9, 3, name="words")(inputs))
    model = keras.Model(inputs, keras.layers.Dense(10)(x))
    rng = np.random.default_rng(0)
    report = ortho_keras.signal_report(model, rng.integers(9, size=(8, 5)), rng.integers(10, size=8), LOGITS)
    assert report.unmeasured == ("words", "lstm")
    first = "nothing is wrong, and there are too few layers to tell the error's growth (not measured: words, lstm)"
    assert str(report).splitlines()[0] == f"{model.name}: {first}"
    with pytest.raises(ValueError, match="`x` must suit the model's layers. Received: x of shape .8, 5. .*7"):
        ortho_keras.signal_report(model, np.full((8, 5), 77), rng.integers(10, size=8), LOGITS)


def test_modulation_does_not_apply_where_the_model_branches():
    model = ortho_keras.residual_cnn(8, (8, 8, 1), width=4)
    rng = np.random.default_rng(0)
    report = ortho_keras.signal_report(model, rng.normal(size=(8, 8, 8, 1)), rng.integers(10, size=8), LOGITS)
    assert "; modulation does not apply, the model branches. Top layer first" in str(report).splitlines()[1]


def test_a_net_whose_layers_are_of_unlike_widths():
    """Narrow and wide convolutions by turns, as in MobileNet: an error's magnitude alternates, and does not grow."""
    layers = []
    for _ in range(8):
        for filters, size in ((32, 1), (4, 1)):
            layers += [
                keras.layers.Conv2D(filters, size, use_bias=False, kernel_initializer="he_normal"),
                keras.layers.BatchNormalization(),
            ]
    line = first_line(*layers, keras.layers.GlobalAveragePooling2D(), shape=(8, 8, 3))
    assert line.startswith("nothing is wrong: the error keeps its magnitude (")
