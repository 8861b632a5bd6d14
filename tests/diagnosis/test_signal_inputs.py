"""signal_report on inputs as `fit` takes them, of models with several and of nested ones, and what it refuses."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from reports import LOGITS, batch, report_of

import ortho_keras


def test_inputs_as_fit_takes_them():
    a, b = keras.Input((4,), name="a"), keras.Input((3,), name="b")
    outputs = keras.layers.Dense(10)(keras.layers.Concatenate()([keras.layers.Dense(5)(b), keras.layers.Dense(6)(a)]))
    model = keras.Model([b, a], outputs)
    (xa, y), (xb, _) = batch((4,)), batch((3,))
    by_name, in_order = (ortho_keras.signal_report(model, x, y, LOGITS) for x in ({"a": xa, "b": xb}, [xb, xa]))
    assert by_name == in_order and by_name.loss == pytest.approx(float(LOGITS(y, model([xb, xa]))), rel=1e-5)
    with pytest.raises(
        ValueError, match=r"`x` must have an entry for each of the inputs \['b', 'a'\]. Received: a dict with \['a'\]"
    ):
        ortho_keras.signal_report(model, {"a": xa}, y, LOGITS)
    with pytest.raises(ValueError, match="Received: 3 arrays"):
        ortho_keras.signal_report(model, [xb, xa, xa], y, LOGITS)

    convolution = keras.Sequential(
        [keras.Input((8, 8, 1)), keras.layers.Conv2D(4, 3), keras.layers.Flatten(), keras.layers.Dense(10)]
    )
    pixels = np.random.default_rng(0).integers(256, size=(8, 8, 8)).astype("uint8")
    flat, full = (ortho_keras.signal_report(convolution, x, y, LOGITS) for x in (pixels, pixels[..., None].astype("float32")))
    assert flat == full


def test_layers_called_by_keyword():
    inputs = keras.Input((5, 6))
    base = keras.Sequential([keras.Input((5, 6)), keras.layers.Dense(6, name="inside")])
    x = keras.layers.MultiHeadAttention(2, 3, name="attention")(query=inputs, value=base(inputs=inputs))
    model = keras.Model(inputs, keras.layers.Dense(10, name="top")(keras.layers.Flatten()(x)))
    assert [layer.name for layer in report_of(model, (5, 6)).layers] == ["inside", "attention", "top"]


def test_a_nested_model_gets_its_inputs_by_name_and_type():
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b", dtype="float32")
    inner = keras.Model([b, a], keras.layers.Subtract()([b, a]))
    first, second = keras.Input((4,)), keras.Input((4,), dtype="uint8")
    model = keras.Model([first, second], keras.layers.Dense(10)(inner({"a": first, "b": second})))
    (x, y), rng = batch((4,)), np.random.default_rng(2)
    x = [x, rng.integers(9, size=(8, 4)).astype("uint8")]
    assert ortho_keras.signal_report(model, x, y, LOGITS).loss == pytest.approx(float(LOGITS(y, model(x))), rel=1e-5)


def test_a_nested_sequential_model_gets_its_input_in_its_type():
    base = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(4, 3), keras.layers.Flatten()])
    pixels = keras.Input((8, 8, 1), dtype="uint8")
    model = keras.Model(pixels, keras.layers.Dense(10)(base(pixels)))
    x, (_, y) = np.random.default_rng(0).integers(256, size=(8, 8, 8, 1)).astype("uint8"), batch((8, 8, 1))
    assert ortho_keras.signal_report(model, x, y, LOGITS).loss == pytest.approx(float(LOGITS(y, model(x))), rel=1e-5)


def test_a_flag_given_by_keyword_beside_the_inputs():
    class Block(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(8)

        def call(self, x, flag=None):
            return self.dense(x)

    inputs = keras.Input((6,))
    report = report_of(keras.Model(inputs, keras.layers.Dense(10)(Block()(x=inputs, flag=True))))
    assert [layer.kind for layer in report.layers] == ["Block", "Dense"]


def test_two_inputs_and_two_outputs():
    a, b = keras.Input((4,), name="a"), keras.Input((3,), name="b")
    x = keras.layers.Concatenate()([keras.layers.Dense(5)(a), keras.layers.Dense(5)(b)])
    model = keras.Model([a, b], {"one": keras.layers.Dense(2)(x), "two": keras.layers.Dense(1)(x)})
    xs = [batch((4,))[0], batch((3,))[0]]

    def loss(y, outputs):
        return tf.reduce_mean(tf.square(outputs["one"])) + tf.reduce_mean(tf.square(outputs["two"] - y))

    report = ortho_keras.signal_report(model, xs, np.ones((8, 1), np.float32), loss)
    assert len(report.layers) == 4 and report.loss > 0


def subclassed():
    class Model(keras.Model):
        def call(self, x):
            return x

    model = Model()
    model(np.zeros((2, 3), np.float32))
    return model


DENSE = [keras.Input((4,)), keras.layers.Dense(10)]


class OwnCall(keras.Model):
    """A Functional model that computes something else than its graph."""

    def __init__(self, inputs, units):
        super().__init__(inputs, keras.layers.Dense(units)(inputs))

    def call(self, x):
        return 1000 * super().call(x)


def test_several_inputs_and_outputs_in_dicts_and_lists():
    left, right = keras.Input((4,)), keras.Input((6,))
    x = keras.layers.Concatenate()([keras.layers.Dense(5, name="l")(left), keras.layers.Dense(5, name="r")(right)])
    model = keras.Model({"right": right, "left": left}, [keras.layers.Dense(10)(x), keras.layers.Dense(1)(x)])
    rng = np.random.default_rng(0)
    x = {"left": rng.normal(size=(8, 4)), "right": rng.normal(size=(8, 6)), "unused": np.zeros(8)}
    y = [rng.integers(10, size=8), rng.normal(size=(8, 1)).astype("float32")]

    def loss(y, outputs):
        return LOGITS(y[0], outputs[0]) + keras.losses.mean_squared_error(y[1], outputs[1])

    report = ortho_keras.signal_report(model, x, y, loss)
    outputs = model({name: x[name] for name in ("left", "right")})
    expected = float(LOGITS(y[0], outputs[0])) + np.mean((outputs[1].numpy() - y[1]) ** 2)
    assert report.loss == pytest.approx(expected, rel=1e-5) and len(report.layers) == 4
    with pytest.raises(ValueError, match="`x` must have an entry for each of the inputs .*'right'"):
        ortho_keras.signal_report(model, {"left": x["left"]}, y, loss)

    ortho_keras.orthonormalize(model, 0.1, verbose=False)  # a penalty, which is no part of the error
    model.compile("sgd", [LOGITS, "mean_squared_error"], loss_weights=[1.0, 0.5])
    compiled = ortho_keras.signal_report(model, x, y)
    halved = ortho_keras.signal_report(
        model, x, y, lambda y, out: LOGITS(y[0], out[0]) + 0.5 * keras.losses.mean_squared_error(y[1], out[1])
    )
    assert compiled.loss == pytest.approx(halved.loss, rel=1e-5)
    magnitudes = [[layer.backward_moment for layer in report.layers] for report in (compiled, halved)]
    np.testing.assert_allclose(*magnitudes, rtol=1e-4)
    assert not any(variable.numpy() for metric in model.metrics for variable in metric.variables)


@pytest.mark.parametrize("loss", ["mse", keras.losses.mean_squared_error, keras.losses.MeanSquaredError()])
def test_a_mask_counts_as_in_evaluate(loss):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 6, 3)).astype("float32"), rng.normal(size=(8, 6, 2)).astype("float32")
    x[:, 3:] = 0
    recurrent = keras.layers.LSTM(4, return_sequences=True)
    model = keras.Sequential([keras.Input((6, 3)), keras.layers.Masking(), recurrent, keras.layers.Dense(2)])
    report = ortho_keras.signal_report(model, x, y, loss)
    by_hand = np.mean(np.square(np.asarray(model(x), np.float64) - y)[:, :3])
    assert report.loss == pytest.approx(by_hand, rel=1e-5)
    model.compile("sgd", loss)
    assert report.layers == ortho_keras.signal_report(model, x, y).layers


@pytest.mark.parametrize("pack", [lambda one: [one], lambda one: (one,), lambda one: {"only": one}])
def test_one_output_in_a_list_or_dict(pack):
    base = keras.Sequential(list(DENSE))
    x, y = batch((4,))
    expected = ortho_keras.signal_report(base, x, y, LOGITS)
    listed = keras.Model(base.inputs, pack(base.outputs[0]), name=base.name)
    assert ortho_keras.signal_report(listed, x, y, LOGITS) == expected
    assert ortho_keras.signal_report(listed, x, pack(y), LOGITS) == expected
    assert ortho_keras.signal_report(listed, [x], y, LOGITS) == expected


def test_a_loss_of_ones_own_gets_the_structures_as_they_are():
    base = keras.Sequential(list(DENSE))
    x, y = batch((4,))
    weights = np.arange(1, 9, dtype="float32")
    named = keras.Model(base.inputs, {"only": base.outputs[0]}, name=base.name)

    def weighted(given, outputs):
        return LOGITS(given["y"], outputs["only"], sample_weight=given["weights"])

    expected = float(LOGITS(y, base(x), sample_weight=weights))
    report = ortho_keras.signal_report(named, x, {"y": y, "weights": weights}, weighted)
    assert report.loss == pytest.approx(expected, rel=1e-5)
    plain = ortho_keras.signal_report(named, x, y, lambda given, outputs: LOGITS(given, outputs["only"]))
    assert plain == ortho_keras.signal_report(base, x, y, LOGITS)


def test_shares_that_do_not_sum_to_one_are_no_logits():
    x, y = batch((4,))
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(10, activation=lambda z: 5 * keras.ops.softplus(z))])
    shares = np.asarray(model(x), np.float64)
    assert shares.max() > 1
    expected = -np.mean(np.log(shares[np.arange(8), y] / shares.sum(1)))
    for loss, targets in (("categorical_crossentropy", np.eye(10)[y]), (keras.losses.CategoricalCrossentropy(), np.eye(10)[y])):
        assert ortho_keras.signal_report(model, x, targets, loss).loss == pytest.approx(expected, rel=1e-5)
    for loss, targets in (("binary_crossentropy", np.eye(10)[y]), ("sparse_categorical_crossentropy", y)):  # cut off at 1
        with pytest.raises(ValueError, match="with from_logits=True"):
            ortho_keras.signal_report(model, x, targets, loss)


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_states_of_a_recurrent_layer_stay(wrapped):
    recurrent = keras.layers.GRU(4, stateful=True)
    layer = keras.layers.Bidirectional(recurrent) if wrapped else recurrent
    model = keras.Sequential([keras.Input(batch_shape=(8, 5, 3)), layer, keras.layers.Dense(10)])
    x, y = batch((5, 3))
    model.predict(x, batch_size=8, verbose=0)
    states = [state for own in ([layer.forward_layer, layer.backward_layer] if wrapped else [layer]) for state in own.states]
    before = [state.numpy() for state in states]
    assert all(value.any() for value in before)
    ortho_keras.signal_report(model, x, y, LOGITS)
    for state, value in zip(states, before, strict=True):
        np.testing.assert_array_equal(state.numpy(), value)


@pytest.mark.parametrize(
    "model,x,y,loss,message",
    [
        (lambda: "net", 8, 8, LOGITS, "`model` must be a built Keras model"),
        (lambda: keras.Sequential([keras.layers.Dense(3)]), 8, 8, LOGITS, "`model` must be a built Keras model"),
        (subclassed, 8, 8, LOGITS, "`model` must be a Functional or Sequential model"),
        (lambda: keras.Sequential([keras.Input((4,)), keras.layers.ReLU()]), 8, 8, LOGITS, "must call a convolution, dense or"),
        (lambda: keras.Sequential(list(DENSE)), 1, 1, LOGITS, r"`x` must be a batch of at least 2 .* \(1, 4\)"),
        (lambda: keras.Sequential(list(DENSE)), 8, 8, None, "`loss` must be given for a model that is not compiled"),
        (
            lambda: keras.Sequential(list(DENSE)),
            8,
            8,
            "nonsense",
            "`loss` must be one Keras loss, .* Received: loss='nonsense'",
        ),
        (
            lambda: keras.Sequential(list(DENSE)),
            8,
            8,
            {"a": "mse"},
            "`loss` must be one Keras loss, its name, or a function",
        ),
        (
            lambda: keras.Sequential([keras.Input((5,)), keras.layers.Dense(10)]),
            8,
            8,
            LOGITS,
            r"`x` .* \(None, 5\). .* \(8, 4\)",
        ),
        (lambda: keras.Sequential(list(DENSE)), 8, 5, LOGITS, r"`y` must hold a target for each of the 8 samples.*\(5,\)"),
        (lambda: keras.Sequential(list(DENSE)), 8, (8, 3), "mse", r"`y` and `loss` must suit .*\(8, 10\)"),
        (lambda: OwnCall(keras.Input((4,)), 10), 8, 8, LOGITS, "`model` must not have a `call` of its own"),
        (lambda: keras.Sequential(list(DENSE)), 8, 8, "sparse_categorical_crossentropy", "give the loss object, with from_"),
        (lambda: keras.Sequential(list(DENSE)), 8, 8, keras.losses.SparseCategoricalCrossentropy(), "with from_logits=True"),
    ],
    ids=[
        "no model",
        "not built",
        "subclassed",
        "no kernels",
        "one image",
        "no loss",
        "unknown loss",
        "two losses",
        "other inputs",
        "too few targets",
        "other targets",
        "a call of its own",
        "probabilities",
        "probabilities for an object",
    ],
)
def test_bad_input(model, x, y, loss, message):
    """`x` and `y` are the number of samples, or a shape."""
    with pytest.raises(ValueError, match=message):
        ortho_keras.signal_report(model(), np.ones((x, 4), np.float32), np.zeros(y, np.int64), loss)
