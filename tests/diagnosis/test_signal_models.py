"""signal_report on models of many kinds."""

import dataclasses
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from reports import LOGITS, batch, report_of

import ortho_keras


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


def test_the_operator_of_a_layer_over_time_steps_is_that_of_one_step():
    def operator(shape, wrap):
        keras.utils.set_random_seed(1)
        convolution = wrap(keras.layers.Conv2D(4, 3, padding="same"))
        net = keras.Sequential([keras.Input(shape), convolution, keras.layers.Flatten(), keras.layers.Dense(10)])
        layer = report_of(net, shape).layers[0]
        return layer.operator_smallest, layer.operator_largest

    alone, timed = operator((12, 10, 2), lambda layer: layer), operator((7, 12, 10, 2), keras.layers.TimeDistributed)
    assert timed == pytest.approx(alone, rel=1e-4) and alone[0] > 0


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
