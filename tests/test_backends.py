"""What the method computes on each of Keras's backends, as `KERAS_BACKEND` says: the same."""

import importlib
import json
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import references
from keras import ops

import ortho_keras as ok
from ortho_keras.method import backend

pytestmark = pytest.mark.every_backend

SAVED = pathlib.Path(__file__).parent / "saved" / "plain8_losses.json"
if backend.NAME == "tensorflow":
    import tensorflow as tf

    RUNS = {"eager": lambda function: function, "compiled": tf.function}

    def slope_of_the_gradient(function, value, direction):
        """The derivative of the gradient along a direction: a product with the Hessian."""
        with tf.GradientTape() as outer:
            outer.watch(value)
            with tf.GradientTape() as inner:
                inner.watch(value)
                result = function(value)
            along = tf.reduce_sum(inner.gradient(result, value) * direction)
        return outer.gradient(along, value)

elif backend.NAME == "jax":
    import jax

    RUNS = {"eager": lambda function: function, "compiled": jax.jit}

    def slope_of_the_gradient(function, value, direction):
        return jax.grad(lambda x: ops.sum(jax.grad(function)(x) * direction))(value)

else:
    import torch

    RUNS = {"eager": lambda function: function}

    def slope_of_the_gradient(function, value, direction):
        value.requires_grad_()
        (gradient,) = torch.autograd.grad(function(value), value, create_graph=True)
        return torch.autograd.grad((gradient * direction).sum(), value)[0]


def as_array(tensor, dtype="float64"):
    return ops.convert_to_numpy(ops.cast(tensor, "float32")).astype(dtype)


def test_the_import_brings_tensorflow_only_as_the_backend():
    code = "import ortho_keras, sys; print('tensorflow' in sys.modules, ortho_keras.method.backend.NAME)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(backend.NAME == "tensorflow"), backend.NAME]


@pytest.mark.skipif(backend.NAME == "tensorflow", reason="it has all of the package")
def test_what_needs_tensorflow_says_so():
    for name in ("signal_report", "SignalMonitor", "Muon", "run"):
        with pytest.raises(
            ImportError, match=f"^ortho_keras.{name} needs Keras's TensorFlow backend. Received: KERAS_BACKEND="
        ):
            getattr(ok, name)
    for package in ("trainer.report", "diagnosis.signals"):
        with pytest.raises(ImportError, match=f"^ortho_keras.{package.partition('.')[0]} needs Keras's TensorFlow backend"):
            importlib.import_module(f"ortho_keras.{package}")
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        ok.nothing  # noqa: B018


@pytest.mark.gpu
@pytest.mark.parametrize("run", RUNS)
def test_penalty_and_gradient_equal_the_oracle(run):
    rng = np.random.default_rng(2)
    for _ in range(12):
        shape = tuple(map(int, rng.integers(1, 6, size=rng.integers(2, 6))))  # tall and wide
        axes = [int(axis) for axis in rng.permutation(len(shape))[: rng.integers(1, len(shape))]]
        layouts = ["standard", "transposed", *["depthwise"][: len(shape) - 2], tuple(axes)]
        layout = layouts[rng.integers(len(layouts))]
        kernel, regularizer = rng.normal(size=shape).astype("float32"), ok.OrthonormalRegularizer(0.37, layout)
        found = RUNS[run](lambda value, of=regularizer: backend.value_and_gradient(of, value))(ops.convert_to_tensor(kernel))
        expected = references.penalty_and_gradient(kernel, layout, 0.37)
        for one, other in zip(found, expected):
            np.testing.assert_allclose(as_array(one), other, rtol=2e-5, atol=2e-5 * np.abs(other).max(), err_msg=f"{shape}")


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("shape", [(7, 4), (2, 5)])
def test_the_second_derivative_of_the_penalty(shape, run):
    kernel, direction = np.random.default_rng(4).normal(size=(2, *shape))
    ahead, behind = (references.penalty_and_gradient(kernel + s * 1e-5 * direction, "standard", 0.37)[1] for s in (1, -1))
    value, along = (ops.convert_to_tensor(array.astype("float32")) for array in (kernel, direction))
    regularizer = ok.OrthonormalRegularizer(0.37)
    found = RUNS[run](lambda *args: slope_of_the_gradient(regularizer, *args))(value, along)
    np.testing.assert_allclose(as_array(found), (ahead - behind) / 2e-5, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("run", RUNS)
def test_related_penalties_equal_their_formulas_and_the_formulas_slopes(run):
    rng = np.random.default_rng(5)
    kernel = np.linalg.qr(rng.normal(size=(18, 4)))[0].reshape(3, 3, 2, 4) * [1.5, 1.1, 0.9, 0.8]  # the norm is well apart
    direction = rng.normal(size=kernel.shape)

    def formulas(kernel):
        return {**references.related_penalties(kernel), "conv": references.convolutional_penalty(kernel, (6, 7), (1, 1))}

    ahead, exact, behind = (formulas(kernel + step * direction) for step in (1e-6, 0, -1e-6))
    regularizers = {
        "double_soft": ok.DoubleSoftOrthogonalRegularizer(0.5),
        "coherence": ok.MutualCoherenceRegularizer(0.5),
        "spectral": ok.SRIPRegularizer(0.5, iterations=20),
        "conv": ok.ConvOrthogonalRegularizer(0.5),
    }
    for name, regularizer in regularizers.items():
        step = RUNS[run](lambda value, of=regularizer: backend.value_and_gradient(of, value))
        penalty, gradient = step(ops.convert_to_tensor(kernel.astype("float32")))
        np.testing.assert_allclose(float(penalty), 0.5 * exact[name], rtol=1e-5, err_msg=name)
        slope = 0.5 * (ahead[name] - behind[name]) / 2e-6
        np.testing.assert_allclose(np.sum(as_array(gradient) * direction), slope, rtol=1e-4, err_msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_kernels_have_float32_penalties(dtype):
    kernel = ops.cast(np.random.default_rng(7).normal(size=(60, 50)).astype("float32") * 90, dtype)  # squares overflow float16
    penalty = ok.OrthonormalRegularizer(1e-3)(kernel)
    expected = references.penalty_and_gradient(as_array(kernel), "standard", 1e-3)[0]
    assert keras.backend.standardize_dtype(penalty.dtype) == "float32"
    np.testing.assert_allclose(float(penalty), expected, rtol=1e-5)


def test_initializers_draw_orthonormal_columns_in_every_type():
    for shape, layout in [
        ((40, 12), "standard"),
        ((12, 40), "standard"),  # wide: 12 + 12 + 12 + 4
        ((3, 3, 64, 64), "standard"),
        ((3, 2, 2, 4, 7), "standard"),
        ((4, 4, 8, 3), "transposed"),
        ((3, 3, 5, 2), "depthwise"),
        ((8, 2, 4), (1, 2)),
    ]:
        kernel = ok.OrthonormalInitializer(1.7, seed=3, layout=layout)(shape)
        assert keras.backend.standardize_dtype(kernel.dtype) == "float32" and tuple(kernel.shape) == shape
        assert references.largest_deviation(as_array(kernel), layout, 1.7) <= 1e-5
    for initializer in (ok.OrthonormalInitializer, ok.DeltaOrthonormalInitializer, ok.DiracInitializer):
        for dtype, rounding in {"float16": 2e-3, "bfloat16": 2e-2, "float32": 1e-5}.items():
            kernel = initializer(seed=1)((3, 3, 8, 8), dtype=dtype)
            assert keras.backend.standardize_dtype(kernel.dtype) == dtype
            assert references.largest_deviation(as_array(kernel), "standard") <= rounding
    np.testing.assert_array_equal(as_array(ok.DiracInitializer()((1, 3, 4, 4)))[0, 1], np.eye(4))


def descend(rules, errors, run, dtype="float32"):
    """Gives each of a ladder of `ErrorModulation`s a row of errors, topmost first, and returns what comes out below."""
    errors = ops.cast(np.asarray(errors, "float32")[::-1].copy(), dtype)

    def total(inputs):
        outputs, token = [], None
        for index, rule in enumerate(rules[::-1]):
            output, token = rule(inputs[index], token)
            outputs.append(output)
        return ops.sum(ops.cast(ops.stack(outputs), "float32") * ops.cast(errors, "float32"))

    step = RUNS[run](lambda inputs: backend.value_and_gradient(total, inputs)[1])
    return as_array(step(ops.zeros(errors.shape, dtype)))[::-1]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("reference", ["neighbour", "anchor"])
def test_modulation_by_hand_and_by_the_oracle(run, reference):
    unit = np.array([0.2, 1.4])  # root of the moment: 1
    rules = [ok.ErrorModulation(2.0, 10.0, reference) for _ in range(5)]
    by_hand = {
        "neighbour": [8, 5, 3, 10, 0.5],  # 8/5 and 5/3 are in tolerance; 3/100 is clipped to 1/10, 10/0.05 to 10
        "anchor": [8, 5, 8, 10, 0.5],  # 8/3 is out of tolerance; 8/100 and 8/0.05 are clipped
    }[reference]
    errors = np.outer([8, 5, 3, 100, 0.05], unit)
    found = descend(rules, errors, run)
    np.testing.assert_allclose(found, np.outer(by_hand, unit), rtol=1e-6)
    np.testing.assert_array_equal(found[:2], np.float32(errors[:2]))
    rng = np.random.default_rng(3)
    for magnitudes in (10.0 ** rng.uniform(-1, 1, 5), 10.0 ** rng.uniform(-6, 6, 5), [1e-30, 1e-20, 1.0, 1e20, 1e30]):
        errors, above, expected = np.float32(np.outer(magnitudes, unit)), None, []
        for error in errors.astype("float64"):
            own = np.sqrt(np.mean(error**2))
            scale, above = references.scale_and_reference(own, above, 2.0, 10.0, reference)
            expected.append(scale * error)
        np.testing.assert_allclose(descend(rules, errors, run), expected, rtol=1e-5)
    rules[1].enabled = False
    errors = np.outer([1, 9, 1], unit)
    np.testing.assert_array_equal(descend(rules[:3], errors, run)[:2], np.float32(errors[:2]))


@pytest.mark.parametrize(("run", "dtype"), [(list(RUNS)[-1], "float16"), ("eager", "bfloat16")])
def test_errors_of_half_precision_and_such_that_cannot_be_used(run, dtype):
    one = np.ones(2)
    rules = [ok.ErrorModulation(2.0, reference="anchor") for _ in range(5)]
    errors = [8 * one, 0 * one, [np.inf, 1], [np.nan, 1], one]
    np.testing.assert_array_equal(descend(rules, errors, run, dtype), [*np.asarray(errors[:4]), 8 * one])


def small_net():
    model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(6, 3), keras.layers.DepthwiseConv2D(3)])
    for layer in (keras.layers.BatchNormalization(), keras.layers.Conv2DTranspose(5, 2), keras.layers.Flatten()):
        model.add(layer)
    model.add(keras.layers.Dense(4))
    return model


def test_orthonormalize_and_fold():
    model, images = small_net(), np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype("float32")
    before = as_array(model(images, training=False))
    report = ok.orthonormalize(model, 0.5, verbose=False)
    kernels = {kernel.path: as_array(kernel) for kernel in model.weights}
    layouts = [kernel.regularizer.layout for kernel in report.covered]
    assert layouts == ["standard", "depthwise", "transposed", "standard"]
    expected = sum(
        references.penalty_and_gradient(kernels[kernel.path], kernel.regularizer.layout, 0.5)[0] for kernel in report.covered
    )
    np.testing.assert_allclose(float(sum(model.losses)), expected, rtol=1e-5)
    np.testing.assert_allclose(as_array(model(images, training=False)), before, rtol=1e-6)
    model.layers[2].moving_mean.assign(np.linspace(-1, 1, 6))
    folded = ok.fold_batchnorm(model)
    assert not [layer for layer in folded.layers if isinstance(layer, keras.layers.BatchNormalization)]
    np.testing.assert_allclose(as_array(folded(images)), as_array(model(images, training=False)), atol=1e-5)
    ok.orthonormalize(model, 0.5, verbose=False, initialize=True)
    assert float(sum(model.losses)) < 1e-9
    assert not ok.check_design(ok.plain_cnn(8, (8, 8, 1), width=16)).fits  # 16 filters of 9 inputs


def test_shifted_relu():
    values = ops.convert_to_tensor(np.array([-3.0, -2.0, -1.0, 2.0], "float32"))
    layer = ok.ShiftedReLU(2.0)
    outputs, slope = backend.value_and_gradient(
        lambda x: ops.sum(layer(x) * ops.convert_to_tensor([1.0, 2.0, 3.0, 4.0])), values
    )
    assert float(outputs) == -2 - 4 - 3 + 8
    np.testing.assert_array_equal(as_array(slope), [0, 0, 3, 4])  # 0 at the corner
    assert np.isnan(as_array(layer(np.array([np.nan], "float32")))).all()


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        regularizer = ok.OrthonormalRegularizer(0.0)
        self.dense = keras.layers.Dense(3, kernel_initializer=ok.OrthonormalInitializer(), kernel_regularizer=regularizer)

    def call(self, x):
        return self.dense(x)


def test_a_model_that_fit_builds_and_settings_that_change_between_steps():
    model, x, y = Subclassed(), np.ones((4, 5), "float32"), np.ones((4, 3), "float32")
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model.fit(x, y, verbose=0)
    assert ok.orthonormality_error(model.dense.kernel) < 1e-6
    model.dense.kernel.assign(2 * model.dense.kernel)  # |W^T W - I|^2 = 9 * 3
    before = model.evaluate(x, y, verbose=0)
    for factor in (1.0, 2.0, 0.0):
        model.dense.kernel_regularizer.factor = factor
        history = model.fit(x, y, validation_data=(x, y), verbose=0).history
        found = [*history["loss"], *history["val_loss"], model.evaluate(x, y, verbose=0)]
        np.testing.assert_allclose(found, before + factor / 2 * 27, rtol=1e-5)


def losses(folder=None):
    """The losses of a net of 8 layers with penalty and modulation, whose weights and images are drawn by NumPy."""
    rng = np.random.default_rng(0)
    net = ok.plain_cnn(8, (8, 8, 1), width=8, regularizer=ok.OrthonormalRegularizer(0.1), relu_shift=0.5)
    weights = net.get_weights()
    for index, weight in enumerate(weights):
        if weight.ndim > 1:
            weights[index] = rng.normal(size=weight.shape) / np.sqrt(weight.size / weight.shape[-1])
    net.set_weights(weights)
    model = ok.modulate(net, 1.05, reference="neighbour")
    model.compile(keras.optimizers.SGD(0.01, 0.9), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    images, labels = rng.random((96, 8, 8, 1)).astype("float32"), rng.integers(10, size=96)
    callbacks = [ok.ModulationSwitch(8), ok.OrthonormalDecay(0.2, every=4)]  # six steps an epoch
    history = model.fit(images, labels, 16, 3, verbose=0, shuffle=False, callbacks=callbacks)
    if folder:
        model.save(folder / "model.keras")
        loaded = ok.load_model(folder / "model.keras")
        np.testing.assert_allclose(as_array(loaded(images)), as_array(model(images)), atol=1e-5)
    return history.history["loss"]


def test_a_net_has_the_same_losses_on_each_backend(tmp_path):
    np.testing.assert_allclose(losses(tmp_path), json.loads(SAVED.read_text()), rtol=1e-4)


@pytest.mark.parametrize("without", ["switch", "decay"])
def test_those_losses_need_each_callback(monkeypatch, without):
    callback = keras.callbacks.Callback
    name = {"switch": "ModulationSwitch", "decay": "OrthonormalDecay"}[without]
    monkeypatch.setattr(ok, name, lambda *_, **__: callback())
    assert abs(losses()[2] / json.loads(SAVED.read_text())[2] - 1) > 1e-3


@pytest.mark.skipif(backend.NAME != "jax", reason="the others keep a model's variables current")
def test_the_state_of_a_step_is_written_back_for_updates_only(monkeypatch):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3)])
    model.compile("sgd", "mse")
    written, sync = [], model.jax_state_sync
    monkeypatch.setattr(model, "jax_state_sync", lambda: (written.append(not model._jax_state_synced), sync()))
    model.fit(np.ones((12, 3)), np.ones((12, 3)), 1, verbose=0, callbacks=[ok.OrthonormalDecay(0.1, every=6)])
    assert sum(written) <= 3  # two updates, and the end of the epoch
