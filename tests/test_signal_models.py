"""signal_report on models of many kinds, on inputs as `fit` takes them, and what it refuses."""

import dataclasses
import math

import keras
import numpy as np
import pytest
import tensorflow as tf

import ortho_keras

LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def batch(shape, count=8, classes=10):
    rng = np.random.default_rng(1)
    return rng.normal(size=(count, *shape)).astype("float32"), rng.integers(classes, size=count)


def report_of(model, shape=(6,), loss=LOGITS, **kwargs):
    return ortho_keras.signal_report(model, *batch(shape, 16), loss, **kwargs)


def figures(report):
    return [[layer.forward_moment, layer.backward_moment, layer.gradient_ratio, layer.dead_share] for layer in report.layers]


def test_activations_inside_a_layer_or_behind_it_are_the_same_net():
    def net(fused):
        keras.utils.set_random_seed(1)
        layers = [keras.Input((6,))]
        for _ in range(3):
            layers += [keras.layers.Dense(8, activation="relu")] if fused else [keras.layers.Dense(8), keras.layers.ReLU()]
        return keras.Sequential([*layers, keras.layers.Dense(10)])

    np.testing.assert_allclose(figures(report_of(net(True))), figures(report_of(net(False))), rtol=1e-5)


@pytest.mark.parametrize(
    "head,classes,loss", [("softmax", 10, "sparse_categorical_crossentropy"), ("sigmoid", 1, "binary_crossentropy")]
)
def test_a_head_of_probabilities_equals_one_of_logits(head, classes, loss):
    def net(activation):
        keras.utils.set_random_seed(1)
        layers = [
            keras.Input((6,)),
            keras.layers.Dense(8, activation="relu"),
            keras.layers.Dense(classes, activation=activation),
        ]
        return keras.Sequential(layers)

    x, y = batch((6,), 16, 2)
    y = y.astype("float32")[:, None] if classes == 1 else y
    logits = LOGITS if classes > 1 else keras.losses.BinaryCrossentropy(from_logits=True)
    probabilities, expected = (ortho_keras.signal_report(net(a), x, y, b) for a, b in ((head, loss), (None, logits)))
    np.testing.assert_allclose(figures(probabilities)[0], figures(expected)[0], rtol=1e-4)
    np.testing.assert_allclose(figures(probabilities)[1][:3], figures(expected)[1][:3], rtol=1e-4)
    assert probabilities.layers[-1].error_to_top == 1


def test_training_mode_reaches_layers_that_take_no_such_argument():
    @keras.saving.register_keras_serializable(package="test")
    class Block(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.dense, self.normalization = keras.layers.Dense(8), keras.layers.BatchNormalization()

        def call(self, x):
            return self.normalization(self.dense(x))

    model = keras.Sequential([keras.Input((6,)), Block(), keras.layers.Dense(10)])
    x, y = batch((6,), 16)
    report = ortho_keras.signal_report(model, 100 + 50 * x, y, LOGITS)
    assert report.loss == pytest.approx(float(LOGITS(y, model(100 + 50 * x, training=True))), rel=1e-5)
    assert [layer.kind for layer in report.layers] == ["Block", "Dense"]


def gradient_ratios(model, x, y):
    """Norm of each kernel's gradient over the kernel's, of the model's own call in training mode."""
    kernels = [variable for variable in model.trainable_variables if variable.name == "kernel"]
    with tf.GradientTape() as tape:
        loss = LOGITS(y, model(x, training=True))
    gradients = tape.gradient(loss, [kernel.value for kernel in kernels])
    return float(loss), [np.linalg.norm(gradient) / np.linalg.norm(kernel) for gradient, kernel in zip(gradients, kernels)]


@pytest.mark.parametrize("nested", [False, True])
def test_an_inference_mode_that_the_graph_fixes_is_not_what_fit_runs(nested):
    inputs = keras.Input((6,))
    normalization = keras.layers.BatchNormalization()
    base = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8), normalization]) if nested else normalization
    hidden = base(keras.layers.Dense(8)(inputs), training=False)
    model = keras.Model(inputs, keras.layers.Dense(10)(keras.layers.ReLU()(hidden)))
    x, y = batch((6,), 16)
    x = 100 + 50 * x
    report = ortho_keras.signal_report(model, x, y, LOGITS)
    loss, ratios = gradient_ratios(model, x, y)
    model.compile(keras.optimizers.SGD(0.0), LOGITS)
    assert report.loss == pytest.approx(loss, rel=1e-5) == pytest.approx(model.fit(x, y, verbose=0).history["loss"][0])
    np.testing.assert_allclose([layer.gradient_ratio for layer in report.layers], ratios, rtol=1e-4)


def test_kernels_that_training_mode_moves_are_put_back():
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.SpectralNormalization(keras.layers.Dense(8)), keras.layers.Dense(10)]
    )
    before = [weight.copy() for weight in model.get_weights()]
    report_of(model)
    for old, new in zip(before, model.get_weights()):
        np.testing.assert_array_equal(old, new)


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


def test_a_subclassed_model_inside_is_one_layer():
    class Inner(keras.Model):
        def __init__(self):
            super().__init__(name="inner")
            self.dense = keras.layers.Dense(10)

        def call(self, x):
            return self.dense(x)

    inputs = keras.Input((6,))
    report = report_of(keras.Model(inputs, keras.layers.Dense(10, name="top")(Inner()(inputs))))
    assert [layer.name for layer in report.layers] == ["inner", "top"] and report.layers[0].gradient_ratio > 0
    assert len(report_of(keras.Model(inputs, keras.layers.ReLU()(Inner()(inputs)))).layers) == 1


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


def test_the_channels_of_an_einsum_can_be_several_axes():
    heads = keras.layers.EinsumDense("...td,dhk->...thk", (5, 2, 3), bias_axes="hk")
    model = keras.Sequential([keras.Input((5, 6)), heads, keras.layers.ReLU(), keras.layers.Flatten(), keras.layers.Dense(10)])
    heads.bias.assign([[5, 5, 5], [-50, -50, -50]])
    x, y = batch((5, 6), 16)
    report = ortho_keras.signal_report(model, x, y, LOGITS)
    outputs = np.einsum("btd,dhk->bthk", x.astype(np.float64), heads.kernel)
    share = outputs.var(0).mean() / outputs.var((0, 1)).mean()
    assert report.layers[0].dead_share == 0.5 and report.layers[0].image_share == pytest.approx(share, rel=1e-4)
    assert not any("pattern" in finding for finding in report.findings)
    flat = keras.layers.EinsumDense("bd,dhk->bhk", (2, 3))
    report = report_of(keras.Sequential([keras.Input((6,)), flat, keras.layers.Flatten(), keras.layers.Dense(10)]))
    assert math.isnan(report.layers[0].image_share) and not report.layers[0].positions


def test_wrapped_layers():
    """Over time steps, the same figures as the layer by itself; a normalized kernel's before its layer's activation."""

    def net(wrap, activation):
        keras.utils.set_random_seed(1)
        inner = wrap(keras.layers.Dense(8, activation=activation))
        return keras.Sequential([keras.Input((5, 6)), inner, keras.layers.Flatten(), keras.layers.Dense(10)])

    for activation in (None, "relu"):
        plain, timed = (report_of(net(wrap, activation), (5, 6)) for wrap in (lambda x: x, keras.layers.TimeDistributed))
        mine, expected = (dataclasses.asdict(report.layers[0]) for report in (timed, plain))
        behind = {"forward_moment", "backward_moment", "error_to_next", "error_to_top", "image_share"}
        for name in set(mine) - {"name", "kind", "scale", "fired"} - (behind if activation else set()):
            assert mine[name] == pytest.approx(expected[name], rel=1e-4, nan_ok=True), name

    report, twin = (net(keras.layers.SpectralNormalization, "relu") for _ in range(2))
    (x, _), report = batch((5, 6), 16), report_of(report, (5, 6))
    twin(x, training=True)  # normalizes its kernel
    kernel, bias = (np.asarray(weight, np.float64) for weight in twin.layers[0].layer.get_weights())
    layer = report.layers[0]
    assert layer.forward_moment == pytest.approx(np.mean((x @ kernel + bias) ** 2), rel=1e-4)
    assert layer.dead_share == 0 and math.isfinite(layer.operator_largest)


def test_growth_is_not_told_across_pooling():
    layers = [keras.Input((16, 16, 1)), keras.layers.Conv2D(4, 3, name="conv"), keras.layers.GlobalAveragePooling2D()]
    report = report_of(keras.Sequential([*layers, keras.layers.Dense(10)]), (16, 16, 1))
    assert math.isnan(report.growth[0]) and report.growth[2] == 0
    assert "nothing is wrong, and there are too few layers to tell the error's growth" in str(report)


def test_an_activation_function_counts_its_dead_channels():
    inputs = keras.Input((6,))
    x = keras.layers.Dense(4, bias_initializer=keras.initializers.Constant(-100.0), name="dead")(inputs)
    report = report_of(keras.Model(inputs, keras.layers.Dense(10)(keras.activations.relu(x))))
    assert report.layers[0].dead_share == 1


def test_an_input_that_two_layers_take_makes_no_chain():
    inputs = keras.Input((6,))
    x = keras.layers.Concatenate()([keras.layers.Dense(8)(inputs), inputs])
    assert all(math.isnan(layer.scale) for layer in report_of(keras.Model(inputs, keras.layers.Dense(10)(x))).layers)


def test_a_branching_model_and_shared_and_nested_layers():
    shared = keras.layers.Dense(6, activation="relu", name="shared")
    inner = keras.Sequential([keras.Input((6,)), keras.layers.Dense(6, name="inner"), keras.layers.ReLU()])
    inputs = keras.Input((6,))
    x = shared(inputs)
    x = keras.layers.Add()([shared(x), inner(x)])
    model = keras.Model(inputs, keras.layers.Dense(10, name="top")(x))
    report = ortho_keras.signal_report(model, *batch((6,), 16), LOGITS)
    assert {layer.name for layer in report.layers} == {"shared", "shared (2)", "inner", "top"}
    assert all(math.isnan(layer.scale) and not layer.fired for layer in report.layers)  # no chain, no modulation
    assert all(0 <= layer.dead_share <= 1 for layer in report.layers if layer.name != "top")
    assert all(layer.backward_moment > 0 for layer in report.layers)


def test_two_inputs_and_two_outputs():
    a, b = keras.Input((4,), name="a"), keras.Input((3,), name="b")
    x = keras.layers.Concatenate()([keras.layers.Dense(5)(a), keras.layers.Dense(5)(b)])
    model = keras.Model([a, b], {"one": keras.layers.Dense(2)(x), "two": keras.layers.Dense(1)(x)})
    xs = [batch((4,))[0], batch((3,))[0]]

    def loss(y, outputs):
        return tf.reduce_mean(tf.square(outputs["one"])) + tf.reduce_mean(tf.square(outputs["two"] - y))

    report = ortho_keras.signal_report(model, xs, np.ones((8, 1), np.float32), loss)
    assert len(report.layers) == 4 and report.loss > 0


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision(policy):
    x, y = batch((8, 8, 1), 32)
    full = ortho_keras.signal_report(ortho_keras.plain_cnn(14, (8, 8, 1), seed=0), x, y, LOGITS)
    keras.config.set_dtype_policy(policy)
    model = ortho_keras.plain_cnn(14, (8, 8, 1), seed=0)
    model.compile(keras.optimizers.SGD(0.01), LOGITS)  # float16: Keras adds the loss scaling
    half = ortho_keras.signal_report(model, x, y)
    assert half.loss == pytest.approx(full.loss, rel=0.05)
    for a, b in zip(full.layers, half.layers):
        assert math.sqrt(b.backward_moment) == pytest.approx(math.sqrt(a.backward_moment), rel=0.3)
        assert b.gradient_ratio == pytest.approx(a.gradient_ratio, rel=0.3)


def test_a_network_of_keras_applications():
    model = keras.applications.MobileNetV2(weights=None, input_shape=(32, 32, 3), classifier_activation=None)
    report = ortho_keras.signal_report(model, *batch((32, 32, 3), 4), LOGITS)
    convolutions = (keras.layers.Conv2D, keras.layers.DepthwiseConv2D, keras.layers.Dense)
    assert len(report.layers) == sum(isinstance(layer, convolutions) for layer in model.layers)
    assert all(math.isfinite(layer.operator_largest) and layer.operator_largest > 0 for layer in report.layers)


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
