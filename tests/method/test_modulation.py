"""The rule: what one ErrorModulation does to an error, and a chain of them against the oracle."""

import chains
import keras
import numpy as np
import pytest
import tensorflow as tf
from chains import (
    NAMES,
    RUNS,
    assert_same_bits,
    backward,
    batch,
    bits,
    descend,
    gradients,
    mismatched_chain,
    root_mean_square,
)

from ortho_keras import ErrorModulation, ShiftedReLU, modulate

every_reference = pytest.mark.parametrize("reference", ["neighbour", "anchor"])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("run", "policy", "reference", "tolerance"),
    [
        ("eager", "mixed_bfloat16", "anchor", 1.0),
        ("graph", "float32", "neighbour", 2.0),
        ("graph", "mixed_float16", "neighbour", 1.0),
        ("xla", "float32", "anchor", 2.0),
    ],
)
def test_gradients_and_scales_equal_the_oracle(run, policy, reference, tolerance):
    keras.config.set_dtype_policy(policy)
    rule = {"tolerance": tolerance, "max_scale": 10.0, "reference": reference}
    model = mismatched_chain()
    modulated = modulate(model, **rule)
    x, y = batch(8, 12)
    expected, scales = chains.modulated_gradients(model, x, y, NAMES, **rule)
    fired = {1.0: set(NAMES) - {"top"}, 2.0: {"dense2", "dense3"} | ({"dense1"} if reference == "neighbour" else set())}
    assert {name for name, scale in scales.items() if scale != 1} == fired[tolerance]

    found, errors = backward(modulated, x, y, RUNS[run])
    assert list(errors) == [f"{name}_modulation" for name in NAMES]
    # Half-precision errors of independent roundings, each of at most 2^-11 (float16) or 2^-8 of an entry.
    rtol = {"float32": 1e-5, "mixed_float16": 2e-3, "mixed_bfloat16": 2e-2}[policy]
    for name, scale in scales.items():
        above, below = errors[f"{name}_modulation"]
        if name in fired[tolerance]:
            np.testing.assert_allclose(root_mean_square(below) / root_mean_square(above), scale, rtol)
        else:
            assert_same_bits(below, above)
    for path, gradient in found.items():
        distance = np.linalg.norm(np.asarray(gradient, np.float64) - expected[path])
        assert distance < 5 * rtol * np.linalg.norm(expected[path]), path


def test_an_accelerator_selects_where_a_processor_branches(monkeypatch):
    model = mismatched_chain()
    x, y = batch(8, 12)
    expected = gradients(modulate(model), x, y, RUNS["graph"])
    accelerator = tf.config.LogicalDevice("/device:GPU:0", "GPU")
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda *kind: [accelerator])
    traced = modulate(model)
    operations = tf.function(lambda: gradients(traced, x, y, RUNS["eager"])).get_concrete_function().graph.get_operations()
    assert not any(operation.type in ("If", "StatelessIf") for operation in operations)
    assert_same_bits(gradients(traced, x, y, RUNS["graph"]), expected)


@every_reference
def test_exactly_at_the_tolerance_does_not_fire(reference):
    error = np.array([1, -1, 1, -1], "float32")
    for magnitude, tolerance in [(2, 2), (0.5, 2), (3, 3), (1 / 3, 3), (1, 1)]:
        above = np.full(4, magnitude, "float32")
        rules = [ErrorModulation(tolerance, reference=reference) for _ in range(2)]
        assert_same_bits(descend(rules, [above, error])[1], error)
        beyond = np.nextafter(above, np.float32(9 if magnitude >= 1 else 0))
        np.testing.assert_array_equal(descend(rules, [beyond, error])[1], beyond * error)


MAGNITUDES = {
    "float32": [1e-30, 1e-20, 1e-19, 1.0, 1e20, 1e30],
    "float16": [6e-8, 4e-6, 1.0, 3e4],  # from the least subnormal to 6e4
    "bfloat16": [1e-30, 1e-20, 1.0, 1e20, 1e30],
}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("run", "reference", "dtype"),
    [("eager", "anchor", "float16"), ("graph", "neighbour", "bfloat16"), ("xla", "anchor", "float32")],
)
def test_moments_of_any_magnitude(run, reference, dtype):
    values = np.random.default_rng(0).uniform(1, 2, (7, 99)) * np.resize([1, -1], (7, 99))
    one = tf.constant([0.2, 1.4])
    summed = 5e-6 if run == "xla" else 1e-6  # XLA adds one entry after the other in float32
    rounding = {"float32": summed, "float16": 2.0**-11 + summed, "bfloat16": 2.0**-8 + summed}[dtype]
    for magnitude in MAGNITUDES[dtype]:
        error = tf.cast(magnitude * values, dtype)
        exact = np.asarray(error).astype(np.float64)
        root = root_mean_square(exact)
        rules = [ErrorModulation(1.0, 1e38, reference) for _ in range(2)]
        # It becomes the scale of the error of 1 below it; below an error of 1, it is divided out.
        upper, scaled = descend(rules, [error, one], RUNS[run])
        assert_same_bits(upper, error)
        np.testing.assert_allclose(scaled, root * np.array([0.2, 1.4]), rtol=summed)
        normalized = np.asarray(descend(rules, [one, error], RUNS[run])[1]).astype(np.float64)
        np.testing.assert_allclose(normalized, exact / root, rtol=rounding)


def test_moment_of_a_large_tensor():
    error = np.random.default_rng(0).uniform(0.5, 1.5, (64, 64, 64, 32)).astype("float32")
    _, scaled = descend([ErrorModulation(1.0), ErrorModulation(1.0)], [error, np.ones(1, "float32")], RUNS["graph"])
    np.testing.assert_allclose(scaled, [root_mean_square(error)], 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(("run", "reference"), [("graph", "anchor"), ("xla", "neighbour")])
def test_unusable_errors_pass_and_leave_the_reference(run, reference):
    values = [[0.0, -0.0], [-np.inf, 1.0], [np.nan, np.inf]]
    one = tf.ones(5)
    unusable = [tf.constant(pair, dtype) for pair in values for dtype in ("float32", "float16")]
    errors = [*unusable, 8 * one, *unusable, one, *unusable]  # with nothing usable above it, a layer is the topmost
    rules = [ErrorModulation(2.0, reference=reference) for _ in errors]
    assert_same_bits(descend(rules, errors, RUNS[run]), [*unusable, 8 * one, *unusable, 8 * one, *unusable])


@pytest.mark.parametrize(("run", "dtype"), [("graph", "float16"), ("xla", "float32")])
def test_subnormal_entries_pass_unchanged_where_nothing_fires(run, dtype):
    patterns = np.array([1, 2, 3, 0x8005, 0x0200], "uint16")  # subnormals of the half types
    subnormal = (patterns.astype("uint32") << 16).view("float32") if dtype == "float32" else tf.bitcast(patterns, dtype)
    error = tf.concat([subnormal, tf.ones(4, dtype)], 0)
    assert np.count_nonzero(bits(error)) == 9
    for enabled in (True, False):
        rules = [ErrorModulation(2.0, enabled=enabled) for _ in range(2)]
        assert_same_bits(descend(rules, [error, error], RUNS[run]), [error, error])


@every_reference
def test_a_disabled_layer_passes_errors_and_still_hands_its_reference_down(reference):
    one = tf.ones(5)
    rules = [ErrorModulation(2.0, reference=reference, enabled=enabled) for enabled in (True, False, True)]
    expected = 32 * one if reference == "neighbour" else 8 * one
    assert_same_bits(descend(rules, [8 * one, 32 * one, one]), [8 * one, 32 * one, expected])


@pytest.mark.parametrize("inner", [ErrorModulation, ShiftedReLU])
def test_a_custom_layer_that_holds_one_can_be_quantized(inner):
    class Block(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.dense, self.inner = keras.layers.Dense(4), inner()

        def build(self, shape):
            self.dense.build(shape)

        def call(self, x):
            return keras.tree.flatten(self.inner(self.dense(x)))[0]

        def compute_output_shape(self, shape):  # so that a model is built without a call
            return (*shape[:-1], 4)

    model = keras.Sequential([keras.Input((8,)), Block()])
    model.quantize("int8")
    assert model.layers[0].dense.quantization_mode == "int8"


def test_jacobians_after_a_second_derivative_in_a_graph():
    model = modulate(keras.Sequential([keras.Input((6,)), *(keras.layers.Dense(n, use_bias=False) for n in (6, 2))]), 1e6)
    a = np.linalg.multi_dot([np.asarray(weights, np.float64) for weights in model.get_weights()])
    x = tf.random.normal((3, 6), seed=0)

    def second():
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                loss = tf.reduce_sum(model(x) ** 2)
            squares = tf.reduce_sum(inner.gradient(loss, x) ** 2)
        return outer.gradient(squares, x)

    for run in (RUNS["graph"], RUNS["xla"]):
        np.testing.assert_allclose(run(second)(), 8 * np.asarray(x) @ a @ a.T @ a @ a.T, rtol=1e-4, atol=1e-4)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = model(x)
    np.testing.assert_allclose(tape.batch_jacobian(y, x), np.broadcast_to(a.T, (3, 2, 6)), rtol=1e-4, atol=1e-5)
