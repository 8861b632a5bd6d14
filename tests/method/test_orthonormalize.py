import keras
import numpy as np
import references
from keras import layers
from layout_models import FACTOR, LAYOUTS, images, oracle, small_model, weights

from ortho_keras import OrthonormalRegularizer, orthonormalize


def test_mobile_net():
    model = keras.applications.MobileNetV2(input_shape=(32, 32, 3), weights=None, classes=10)
    before, x = model.get_weights(), images(model)
    outputs = model(x)
    report = orthonormalize(model, factor=FACTOR, verbose=False)
    layouts = {}
    for layer in model.layers:
        if isinstance(layer, layers.DepthwiseConv2D):
            layouts[layer.kernel.path] = "depthwise"
        elif isinstance(layer, (layers.Conv2D, layers.Dense)):
            layouts[layer.kernel.path] = "standard"
    assert {kernel.path: kernel.regularizer.layout for kernel in report.covered} == layouts
    assert len(report.covered) == len(layouts) == 53 and report.skipped == []  # 52 convolutions and the classifier
    assert {regularizer.layout for regularizer in report.regularizers} == {"standard", "depthwise"}

    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(new, old)
    np.testing.assert_array_equal(model(x), outputs)
    penalty = oracle(model, layouts, FACTOR)
    np.testing.assert_allclose(sum(model.losses), penalty, rtol=1e-5)

    for regularizer in report.regularizers:
        regularizer.factor = 1.0
    model.compile(keras.optimizers.SGD(0.1, clipnorm=10), "sparse_categorical_crossentropy")
    losses = model.fit(x, np.arange(4), epochs=2, verbose=0).history["loss"]
    assert penalty / FACTOR < losses[0] < penalty / FACTOR + 10  # the rest is the crossentropy
    assert oracle(model, layouts, FACTOR) < 0.97 * penalty


def test_small_model_equals_the_oracle_and_keeps_every_bit():
    model = small_model()
    before, x = model.get_weights(), images(model)
    outputs = model.predict(x, verbose=0)
    report = orthonormalize(model, factor=FACTOR, verbose=False)
    assert {kernel.path: kernel.regularizer.layout for kernel in report.covered} == LAYOUTS
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(new, old)
    np.testing.assert_array_equal(model.predict(x, verbose=0), outputs)
    np.testing.assert_array_equal(model(x), outputs)
    assert len(model.losses) == 5
    np.testing.assert_allclose(sum(model.losses), oracle(model, LAYOUTS, FACTOR), rtol=1e-5)


def test_a_training_step_follows_the_penalty_s_gradient():
    model = small_model()
    orthonormalize(model, factor=0.3, verbose=False)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    before = {path: weights(model)[path].numpy() for path in LAYOUTS}
    model.train_on_batch(np.zeros((2, 3, 4, 2)), np.zeros((2, 7)))  # the data have no gradient, only the penalty has
    for path, layout in LAYOUTS.items():
        gradient = references.penalty_and_gradient(before[path], layout, 0.3)[1]
        np.testing.assert_allclose(weights(model)[path].numpy(), before[path] - 0.1 * gradient, rtol=1e-5, atol=1e-6)
        assert np.abs(0.1 * gradient).max() > 1e-3


def test_a_fitted_model_takes_effect_at_the_next_fit_and_evaluation():
    model = small_model()
    model.compile(keras.optimizers.SGD(0.0, momentum=0.9), "mse", metrics=["mae"])
    x, y = images(model), np.ones((4, 7), "float32")
    plain = model.fit(x, y, validation_data=(x, y), verbose=0).history
    assert model.evaluate(x, y, verbose=0)[0] == plain["val_loss"][0]
    optimizer = model.optimizer
    report = orthonormalize(model, factor=3.0, verbose=False)
    penalty = oracle(model, LAYOUTS, 3.0)
    assert model.optimizer is optimizer and optimizer.iterations == 1

    np.testing.assert_allclose(model.evaluate(x, y, verbose=0)[0], plain["loss"][0] + penalty, rtol=1e-5)
    ours = model.fit(x, y, validation_data=(x, y), verbose=0).history
    np.testing.assert_allclose(ours["loss"] + ours["val_loss"], [plain["loss"][0] + penalty] * 2, rtol=1e-5)
    assert optimizer.iterations == 2

    for regularizer in report.regularizers:  # a warm-up, without retracing
        regularizer.factor = 0.0
    train_function, test_function = model.train_function, model.test_function
    np.testing.assert_allclose(model.fit(x, y, verbose=0).history["loss"], plain["loss"], rtol=1e-6)
    np.testing.assert_allclose(model.evaluate(x, y, verbose=0)[0], plain["loss"][0], rtol=1e-6)
    assert model.train_function is train_function and model.test_function is test_function


def test_a_second_call_replaces_the_factor():
    model = small_model()
    orthonormalize(model, factor=1.0, verbose=False)
    report = orthonormalize(model, factor=FACTOR, verbose=False)
    np.testing.assert_allclose(sum(model.losses), oracle(model, LAYOUTS, FACTOR), rtol=1e-5)
    assert {kernel.replaced for kernel in report.covered} == {"OrthonormalRegularizer"}


def test_one_regularizer_for_each_layout():
    model = small_model()
    report = orthonormalize(model, verbose=False)
    assert sorted(str(regularizer.layout) for regularizer in report.regularizers) == sorted(map(str, set(LAYOUTS.values())))
    for regularizer in report.regularizers:
        assert regularizer.factor == 1e-4
        regularizer.factor = 0.5
    np.testing.assert_allclose(sum(model.losses), oracle(model, LAYOUTS, 0.5), rtol=1e-5)


def test_grouped_convolutions_get_a_regularizer_of_their_own():
    x = keras.Input((4, 4, 6))
    y = layers.Conv2D(6, 2, groups=3, name="grouped")(x)
    model = keras.Model(x, layers.Conv2D(4, 2, name="whole")(y))
    report = orthonormalize(model, factor=1.0, verbose=False)
    assert [(r.layout, r.groups) for r in report.regularizers] == [("standard", 3), ("standard", 1)]
    assert [kernel.matrices for kernel in report.covered] == [(3, 8, 2), (1, 24, 4)]
    grouped, whole = (model.get_layer(name).kernel.numpy() for name in ("grouped", "whole"))
    parts = [grouped[..., at : at + 2] for at in (0, 2, 4)] + [whole]
    expected = sum(references.penalty_and_gradient(part, "standard", 1.0)[0] for part in parts)
    np.testing.assert_allclose(sum(model.losses), expected, rtol=1e-5)


def test_penalties_of_kernels_are_replaced_and_those_of_biases_kept():
    bias_regularizer = keras.regularizers.L1(0.2)
    model = small_model(keras.regularizers.L2(0.1), bias_regularizer)
    model.get_layer("classifier").bias.assign(-np.arange(7.0))
    report = orthonormalize(model, factor=FACTOR, verbose=False)
    np.testing.assert_allclose(sum(model.losses), oracle(model, LAYOUTS, FACTOR) + 0.2 * 21, rtol=1e-5)
    replaced = {kernel.path for kernel in report.covered if kernel.replaced == "L2"}
    assert replaced == {"separable/depthwise_kernel", "separable/pointwise_kernel", "classifier/kernel"}
    classifier, separable = model.get_layer("classifier"), model.get_layer("separable")
    assert classifier.bias_regularizer is bias_regularizer
    for layer, name in (
        (classifier, "kernel_regularizer"),
        (separable, "depthwise_regularizer"),
        (separable, "pointwise_regularizer"),
    ):
        assert type(getattr(layer, name)) is OrthonormalRegularizer
    assert str(report).count("replaces L2") == 3


def test_survives_a_saved_model(tmp_path):
    model = small_model(keras.regularizers.L2(0.1), keras.regularizers.L1(0.2))
    model.compile("sgd", "mse")
    orthonormalize(model, factor=FACTOR, verbose=False)
    x, y = images(model), np.ones((4, 7), "float32")
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", safe_mode=True)
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    for path, layout in LAYOUTS.items():
        regularizer = weights(loaded)[path].regularizer
        assert type(regularizer) is OrthonormalRegularizer and (regularizer.factor, regularizer.layout) == (FACTOR, layout)
    assert float(sum(loaded.losses)) == float(sum(model.losses))
    bias = loaded.get_layer("classifier").bias
    assert type(bias.regularizer) is keras.regularizers.L1
    assert loaded.evaluate(x, y, verbose=0) == model.evaluate(x, y, verbose=0)
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    assert float(sum(clone.losses)) == float(sum(model.losses))
