"""signal_report against float64 backpropagation by hand, on models of many kinds, and what it must leave alone."""

import dataclasses
import math

import chains
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from reports import LOGITS, batch, report_of

import ortho_keras


def figures(report):
    return [[layer.forward_moment, layer.backward_moment, layer.gradient_ratio, layer.dead_share] for layer in report.layers]


def test_two_dense_layers_by_hand():
    a, b = np.array([[2.0, 0.0], [0.0, 3.0]]), np.array([[1.0], [-1.0]])
    x, y = np.array([[1.0, 2.0], [3.0, -1.0]]), np.array([[0.5], [1.0]])
    model = keras.Sequential([keras.Input((2,)), layers.Dense(2, use_bias=False), layers.Dense(1, use_bias=False)])
    model.set_weights([a, b])
    report = ortho_keras.signal_report(model, x.astype("float32"), y.astype("float32"), "mean_squared_error")
    hidden = x @ a
    top = 2 * (hidden @ b - y) / 2  # the mean over two samples of one output each
    error = top @ b.T
    first, second = report.layers
    moments = report.loss, first.forward_moment, first.backward_moment, second.backward_moment
    assert moments == pytest.approx([np.mean(values**2) for values in (top, hidden, error, top)])
    assert first.gradient_ratio == pytest.approx(np.linalg.norm(x.T @ error) / np.linalg.norm(a))
    assert second.gradient_ratio == pytest.approx(np.linalg.norm(hidden.T @ top) / np.linalg.norm(b))
    assert (first.kernel_smallest, first.kernel_largest, first.operator_largest) == pytest.approx((2, 3, 3))
    assert first.mean_cosine == first.mean_abs_cosine == 0 and math.isnan(second.mean_cosine)
    assert math.isnan(first.image_share) and math.isnan(first.dead_share)


@pytest.mark.parametrize(("tolerance", "reference"), [(1.0, "neighbour"), (2.0, "anchor")])
def test_what_modulation_would_do_is_what_it_does(tolerance, reference):
    x, y = batch((8, 8, 1))
    model = ortho_keras.plain_cnn(8, (8, 8, 1), width=4, seed=0)
    report = ortho_keras.signal_report(model, x, y, LOGITS, tolerance, reference=reference, singular_values=False)
    for layer, after in zip(report.layers, [*report.layers[1:], report.layers[-1]]):
        for found, other in ((layer.error_to_next, after), (layer.error_to_top, report.layers[-1])):
            assert found == pytest.approx(math.sqrt(layer.backward_moment / other.backward_moment))
    names = {layer.name for layer in report.layers}
    gradients, scales = chains.modulated_gradients(model, x, y, names, tolerance, 1000.0, reference)
    modulated = ortho_keras.modulate(model, tolerance, reference=reference)
    did = ortho_keras.signal_report(modulated, x, y, LOGITS, singular_values=False)
    assert did.modulated and not report.modulated and any(layer.fired for layer in did.layers)
    for would, layer in zip(report.layers, did.layers, strict=True):
        assert would.scale == pytest.approx(scales[layer.name], rel=1e-3) == pytest.approx(layer.scale, rel=1e-3)
        assert would.fired == layer.fired == (scales[layer.name] != 1)
        kernel = model.get_layer(layer.name).kernel  # the gradient that the modulated net trains on
        expected = np.linalg.norm(gradients[kernel.path]) / np.linalg.norm(kernel)
        assert layer.gradient_ratio == pytest.approx(expected, rel=1e-3)


def test_the_plain_net_explodes_and_the_report_says_so():
    options = {"shape": (8, 8, 1), "singular_values": False}
    report = report_of(ortho_keras.plain_cnn(44, (8, 8, 1), seed=0), **options)
    total, per_layer, steps = report.growth
    assert steps == 41 and total == pytest.approx(per_layer**steps)  # 43 convolutions, the first left out
    assert total > 50 and 1.1 < per_layer < 1.25  # theory for dense nets: sqrt(pi / (pi - 1)) = 1.21
    assert str(report).startswith(f"plain44: the error grows by {per_layer:.3g}x per layer towards the input: {total:.2g}x")
    calm = report_of(ortho_keras.plain_cnn(44, (8, 8, 1), relu_shift=3.0, seed=0), **options)
    assert calm.findings == [] and str(calm).startswith("plain44: nothing is wrong: the error keeps its magnitude")


def test_image_share_and_dead_channels_by_hand():
    # A 1x1 identity over two channels: the first differs between images only, the second between positions only.
    x = np.full((4, 2, 2, 3), -5, np.float32)
    x[..., 0] = np.array([-1.0, 1.0, -1.0, 1.0])[:, None, None]
    x[..., 1] = np.array([[-2.0, 2.0], [2.0, -2.0]])
    conv = layers.Conv2D(3, 1, use_bias=False, kernel_initializer=lambda shape, dtype: np.eye(3, dtype="f4")[None, None])
    model = keras.Sequential([keras.Input((2, 2, 3)), conv, layers.ReLU(), layers.Flatten(), layers.Dense(1)])
    layer = ortho_keras.signal_report(model, x, np.ones((4, 1), np.float32), "mean_squared_error").layers[0]
    assert (layer.image_share, layer.dead_share) == pytest.approx((1 / (1 + 4), 1 / 3))


def test_nothing_is_changed():
    x, y = batch((4, 3))

    def train(report):
        keras.utils.set_random_seed(5)
        noisy = [layers.GaussianNoise(0.1), layers.Conv1D(4, 3), layers.BatchNormalization(), layers.Dropout(0.5)]
        recurrent = layers.Bidirectional(layers.GRU(4, stateful=True))  # whose states are no variables of the model
        head = layers.SpectralNormalization(layers.Dense(10))
        model = keras.Sequential([keras.Input(batch_shape=(8, 4, 3)), *noisy, recurrent, head])
        model.compile(keras.optimizers.Adam(0.01), LOGITS)
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
        variables = [*model.variables, *model.optimizer.variables]
        variables += [*recurrent.forward_layer.states, *recurrent.backward_layer.states]
        before = [variable.numpy().copy() for variable in variables]
        if report:
            first, second = (ortho_keras.signal_report(model, x, y) for _ in range(2))
            assert repr(first) == repr(second)  # dropout and noise drew the same
        for old, new in zip(before, variables):
            np.testing.assert_array_equal(old, new.numpy())
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
        return model.get_weights()

    for with_report, without in zip(train(True), train(False)):
        np.testing.assert_array_equal(with_report, without)


def test_a_head_of_probabilities_equals_one_of_logits():
    def net(activation):
        keras.utils.set_random_seed(1)
        return keras.Sequential([keras.Input((6,)), layers.Dense(8, "relu"), layers.Dense(10, activation)])

    probabilities, expected = report_of(net("softmax"), loss="sparse_categorical_crossentropy"), report_of(net(None))
    np.testing.assert_allclose(figures(probabilities)[0], figures(expected)[0], rtol=1e-4)
    np.testing.assert_allclose(figures(probabilities)[1][:3], figures(expected)[1][:3], rtol=1e-4)
    assert probabilities.layers[-1].error_to_top == 1


def test_an_inference_mode_that_the_graph_fixes_is_not_what_fit_runs():
    inputs = keras.Input((6,))
    base = keras.Sequential([keras.Input((8,)), layers.Dense(8), layers.BatchNormalization()])
    hidden = base(layers.BatchNormalization()(layers.Dense(8)(inputs), training=False), training=False)
    model = keras.Model(inputs, layers.Dense(10)(layers.ReLU()(hidden)))
    x, y = batch((6,), 16)
    x = 100 + 50 * x
    report = ortho_keras.signal_report(model, x, y, LOGITS)
    kernels = [variable for variable in model.trainable_variables if variable.name == "kernel"]
    with tf.GradientTape() as tape:
        loss = LOGITS(y, model(x, training=True))
    gradients = tape.gradient(loss, [kernel.value for kernel in kernels])
    ratios = [np.linalg.norm(gradient) / np.linalg.norm(kernel) for gradient, kernel in zip(gradients, kernels)]
    np.testing.assert_allclose([layer.gradient_ratio for layer in report.layers], ratios, rtol=1e-4)
    model.compile(keras.optimizers.SGD(0.0), LOGITS)
    assert report.loss == pytest.approx(float(loss), rel=1e-5) == pytest.approx(model.fit(x, y, verbose=0).history["loss"][0])


def test_a_custom_layer_and_a_subclassed_model_are_one_layer_each_and_run_in_training_mode():
    class Block(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.dense, self.normalization = layers.Dense(8), layers.BatchNormalization()

        def call(self, x, flag=None):
            return self.normalization(self.dense(x))

    class Inner(Block, keras.Model):
        pass

    inputs = keras.Input((6,))
    model = keras.Model(
        inputs, layers.Dense(10)(Inner()(Block()(x=inputs, flag=True)))
    )  # a flag by keyword, in addition to the inputs
    x, y = batch((6,), 16)
    x = 100 + 50 * x
    report = ortho_keras.signal_report(model, x, y, LOGITS)
    assert report.loss == pytest.approx(float(LOGITS(y, model(x, training=True))), rel=1e-5)
    assert [layer.kind for layer in report.layers] == ["Block", "Inner", "Dense"] and report.layers[1].gradient_ratio > 0


def test_the_channels_of_an_einsum_can_be_several_axes():
    heads = layers.EinsumDense("...td,dhk->...thk", (5, 2, 3), bias_axes="hk")
    model = keras.Sequential([keras.Input((5, 6)), heads, layers.ReLU(), layers.Flatten(), layers.Dense(10)])
    heads.bias.assign([[5, 5, 5], [-50, -50, -50]])
    report, x = report_of(model, (5, 6)), batch((5, 6), 16)[0]
    outputs = np.einsum("btd,dhk->bthk", x.astype(np.float64), heads.kernel)
    share = outputs.var(0).mean() / outputs.var((0, 1)).mean()
    assert report.layers[0].dead_share == 0.5 and report.layers[0].image_share == pytest.approx(share, rel=1e-4)
    flat = layers.EinsumDense("bd,dhk->bhk", (2, 3))
    report = report_of(keras.Sequential([keras.Input((6,)), flat, layers.Flatten(), layers.Dense(10)]))
    assert math.isnan(report.layers[0].image_share) and not report.layers[0].positions


def test_wrapped_layers():
    """Over time steps, the same figures as the layer by itself; a normalized kernel's before its layer's activation."""

    def net(shape, layer):
        return keras.Sequential([keras.Input(shape), layer, layers.Flatten(), layers.Dense(10)])

    def dense(wrap, activation):
        keras.utils.set_random_seed(1)
        return net((5, 6), wrap(layers.Dense(8, activation)))

    for activation in (None, "relu"):
        plain, timed = (report_of(dense(wrap, activation), (5, 6)) for wrap in (lambda x: x, layers.TimeDistributed))
        mine, expected = (dataclasses.asdict(report.layers[0]) for report in (timed, plain))
        after = {"forward_moment", "backward_moment", "error_to_next", "error_to_top", "image_share"}
        for name in set(mine) - {"name", "kind", "scale", "fired"} - (after if activation else set()):
            assert mine[name] == pytest.approx(expected[name], rel=1e-4, nan_ok=True), name

    model, same = (dense(layers.SpectralNormalization, "relu") for _ in range(2))
    (x, _), report = batch((5, 6), 16), report_of(model, (5, 6))
    same(x, training=True)  # normalizes its kernel
    kernel, bias = (np.asarray(weight, np.float64) for weight in same.layers[0].layer.get_weights())
    layer = report.layers[0]
    assert layer.forward_moment == pytest.approx(np.mean((x @ kernel + bias) ** 2), rel=1e-4)
    assert layer.dead_share == 0 and math.isfinite(layer.operator_largest)

    found = []
    for shape, wrap in (((12, 10, 2), lambda layer: layer), ((3, 12, 10, 2), layers.TimeDistributed)):
        keras.utils.set_random_seed(1)
        layer = report_of(net(shape, wrap(layers.Conv2D(4, 3, padding="same"))), shape).layers[0]
        found.append((layer.operator_smallest, layer.operator_largest))
    assert found[0] == pytest.approx(found[1], rel=1e-4) and found[0][0] > 0


def test_branches_shared_and_nested_layers_and_activation_functions():
    shared = layers.Dense(6, activation="relu", name="shared")
    inner = keras.Sequential([keras.Input((6,)), layers.Dense(6, name="inner"), layers.ReLU()])
    inputs = keras.Input((6,))
    x = shared(inputs)
    x = layers.Concatenate()([shared(x), inner(inputs=x), inputs])
    x = keras.activations.relu(layers.Dense(4, bias_initializer=keras.initializers.Constant(-100.0), name="dead")(x))
    report = report_of(keras.Model(inputs, layers.Dense(10, name="top")(x)))
    assert {layer.name for layer in report.layers} == {"shared", "shared (2)", "inner", "dead", "top"}
    assert all(math.isnan(layer.scale) and not layer.fired for layer in report.layers)  # no chain, no modulation
    assert "; modulation does not apply, the model branches. Last layer first" in str(report).splitlines()[1]
    dead = {layer.name: layer.dead_share for layer in report.layers}
    assert dead["dead"] == 1 and all(0 <= dead[name] < 1 for name in ("shared", "shared (2)", "inner"))


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision(policy):
    def report():
        model = ortho_keras.plain_cnn(8, (8, 8, 1), width=4, seed=0)
        model.compile(keras.optimizers.SGD(0.01), LOGITS)  # float16: Keras adds the loss scaling
        return ortho_keras.signal_report(model, *batch((8, 8, 1), 32), singular_values=False)

    full = report()
    keras.config.set_dtype_policy(policy)
    half = report()
    assert half.loss == pytest.approx(full.loss, rel=0.05)
    found, expected = (np.array(figures(each))[:, 1:3] ** (0.5, 1) for each in (half, full))
    np.testing.assert_allclose(found, expected, rtol=0.3)


def trunk(inputs, depth=6):
    for number in range(depth):
        initializer = ortho_keras.OrthonormalInitializer(seed=number)
        inputs = layers.Conv2D(8, 3, padding="same", kernel_initializer=initializer)(inputs)
        inputs = ortho_keras.ShiftedReLU(2.0)(layers.BatchNormalization()(inputs))
    return inputs


@pytest.mark.parametrize("weight", [1.0, 1e-3])
def test_growth_is_along_the_path_to_an_output(weight):
    """Heads in parallel are not above one another, whatever the weights of their losses."""
    inputs = keras.Input((8, 8, 3))
    pooled = layers.GlobalAveragePooling2D()(trunk(inputs))
    heads = [layers.Dense(10, name="kind")(pooled), layers.Dense(1, name="age")(pooled)]
    model = keras.Model(inputs, heads)
    model.compile("sgd", [LOGITS, "mse"], loss_weights=[1.0, weight])
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 8, 8, 3)), [rng.integers(10, size=16), rng.normal(size=(16, 1))]
    report = ortho_keras.signal_report(model, x, y, singular_values=False)
    ends = [report.layers[path[-1]].name for path in report.paths]
    assert ends == ["kind", "age"] and all(path[:-1] == (0, 1, 2, 3, 4, 5) for path in report.paths)
    errors = [layer.backward_moment**0.5 for layer in report.layers]
    assert report.growth == pytest.approx((errors[1] / errors[5], (errors[1] / errors[5]) ** (1 / 4), 4))


def test_a_residual_block_lies_on_the_path_and_a_short_branch_does_not():
    inputs = keras.Input((8, 8, 3))
    first = layers.Conv2D(4, 3, padding="same")(inputs)
    second = layers.Conv2D(4, 3, padding="same")(layers.ReLU()(first))
    both = layers.Add()([layers.Conv2D(4, 1)(inputs), second])
    model = keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(both)))
    report = report_of(model, (8, 8, 3))
    (path,) = report.paths
    assert [type(model.get_layer(report.layers[at].name)).__name__ for at in path] == ["Conv2D", "Conv2D", "Dense"]
    assert [model.get_layer(report.layers[at].name).kernel_size for at in path[:2]] == [(3, 3), (3, 3)]


@pytest.mark.parametrize("head", ["dense", "convolution of one pixel", "convolution of all pixels"])
def test_a_map_of_vectors_has_no_positions_however_it_is_written(head):
    inputs = keras.Input((4, 4, 3))
    h = layers.Conv2D(5, 3, padding="same", name="trunk")(inputs)
    if head == "dense":
        h = layers.Dense(10, name="head")(layers.GlobalAveragePooling2D()(h))
    elif head == "convolution of one pixel":
        h = layers.Flatten()(layers.Conv2D(10, 1, name="head")(layers.GlobalAveragePooling2D(keepdims=True)(h)))
    else:
        h = layers.Flatten()(layers.Conv2D(10, 4, name="head")(h))
    report = report_of(keras.Model(inputs, h), (4, 4, 3))
    assert {layer.name: layer.positions for layer in report.layers} == {"trunk": True, "head": False}
