"""The rule: what one ErrorModulation does to an error, and a chain of them against the oracle."""

import keras
import numpy as np
import pytest
import references
import tensorflow as tf
from chains import (
    NAMES,
    RUNS,
    assert_same_bits,
    backward,
    batch,
    bits,
    dense_chain,
    descend,
    gradients,
    mismatched_chain,
    modulations,
    root_mean_square,
)

from ortho_keras import ErrorModulation, modulate, switch_modulation

every_run = pytest.mark.parametrize("run", RUNS)
every_reference = pytest.mark.parametrize("reference", ["neighbour", "anchor"])

# The backward pass


@pytest.mark.parametrize(
    ("run", "policy", "reference", "tolerance"),
    [
        ("eager", "float32", "neighbour", 2.0),
        ("eager", "mixed_bfloat16", "anchor", 1.0),
        ("graph", "float32", "anchor", 2.0),
        ("graph", "mixed_float16", "neighbour", 1.0),
        ("xla", "float32", "anchor", 1.0),
        ("xla", "mixed_float16", "neighbour", 2.0),
    ],
)
def test_gradients_and_scales_equal_the_oracle(run, policy, reference, tolerance):
    keras.config.set_dtype_policy(policy)
    rule = {"tolerance": tolerance, "max_scale": 10.0, "reference": reference}
    model = mismatched_chain()
    modulated = modulate(model, **rule)
    x, y = batch(8, 12)
    expected, scales = references.modulated_gradients(model, x, y, NAMES, **rule)
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


@pytest.mark.parametrize(("run", "policy"), [("eager", "mixed_bfloat16"), ("graph", "float32"), ("xla", "float32")])
def test_gradients_are_the_unmodulated_where_nothing_fires(run, policy):
    keras.config.set_dtype_policy(policy)
    model = dense_chain()
    x, y = batch(8, 6)
    expected = gradients(model, x, y, RUNS[run])
    for rule in ({"tolerance": 1e4}, {"tolerance": 1.0, "enabled": False}):
        found = gradients(modulate(model, **rule), x, y, RUNS[run])
        if run != "xla":
            assert_same_bits(found, expected)
            continue
        for path, gradient in expected.items():  # XLA may round in other places where the program differs
            assert np.linalg.norm(found[path] - gradient) <= 1e-6 * np.linalg.norm(gradient), path


@every_reference
def test_an_accelerator_selects_where_a_processor_branches(reference, monkeypatch):
    model, tolerance = mismatched_chain(), 2.0
    x, y = batch(8, 12)
    expected = gradients(modulate(model, tolerance, reference=reference), x, y, RUNS["graph"])
    accelerator = tf.config.LogicalDevice("/device:GPU:0", "GPU")
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda *kind: [accelerator])
    traced = modulate(model, tolerance, reference=reference)
    operations = tf.function(lambda: gradients(traced, x, y, RUNS["eager"])).get_concrete_function().graph.get_operations()
    assert not any(operation.type in ("If", "StatelessIf") for operation in operations)
    assert_same_bits(gradients(traced, x, y, RUNS["graph"]), expected)


@every_run
def test_a_case_done_by_hand(run):
    unit = np.array([0.2, 1.4], "float32")  # root of the moment: 1
    errors = [8 * unit, 5 * unit, 3 * unit, 100 * unit, 0.05 * unit]
    by_hand = {
        "neighbour": [8, 5, 3, 10, 0.5],  # 8/5 and 5/3 are in tolerance; 3/100 is clipped to 1/10, 10/0.05 to 10
        "anchor": [8, 5, 8, 10, 0.5],  # 8/3 is out of tolerance; 8/100 and 8/0.05 are clipped
    }
    for reference, magnitudes in by_hand.items():
        rules = [ErrorModulation(2.0, 10.0, reference) for _ in errors]
        found = descend(rules, errors, RUNS[run])
        np.testing.assert_allclose(found, [magnitude * unit for magnitude in magnitudes], rtol=1e-6)
        assert_same_bits(found[:2], errors[:2])


@every_reference
def test_exactly_at_the_tolerance_does_not_fire(reference):
    error = np.array([1, -1, 1, -1], "float32")
    for magnitude, tolerance in [(2, 2), (0.5, 2), (3, 3), (1 / 3, 3), (1, 1)]:
        above = np.full(4, magnitude, "float32")
        rules = [ErrorModulation(tolerance, reference=reference) for _ in range(2)]
        assert_same_bits(descend(rules, [above, error])[1], error)
        beyond = np.nextafter(above, np.float32(9 if magnitude >= 1 else 0))
        np.testing.assert_array_equal(descend(rules, [beyond, error])[1], beyond * error)


def test_anchor_holds_a_drift_that_neighbours_do_not_see():
    unit = tf.constant([0.2, 1.4])
    for reference in ("neighbour", "anchor"):
        rules = [ErrorModulation(2.0, reference=reference) for _ in range(30)]
        x = tf.zeros(2)
        below, token = [], None
        with tf.GradientTape() as tape:
            tape.watch(x)
            h = x
            for rule in rules:
                below.append(h := 1.15 * h)
                h, token = rule(h, token)
        found = tape.gradient(h, below, output_gradients=unit)
        magnitudes = np.array([root_mean_square(error) for error in found[::-1]])
        if reference == "neighbour":
            np.testing.assert_allclose(magnitudes, 1.15 ** np.arange(30), rtol=1e-5)  # up to 57
        else:
            # 1.15^4 is 1.75 and 1.15^5 is 2.01: every fifth layer is set back.
            np.testing.assert_allclose(magnitudes, 1.15 ** (np.arange(30) % 5), rtol=1e-5)


MAGNITUDES = {
    "float32": [1e-30, 1e-20, 1e-19, 1.0, 1e20, 1e30],
    "float16": [6e-8, 4e-6, 1.0, 3e4],  # from the least subnormal to 6e4
    "bfloat16": [1e-30, 1e-20, 1.0, 1e20, 1e30],
}


@pytest.mark.parametrize(
    ("run", "reference", "dtype"),
    [
        ("eager", "neighbour", "float32"),
        ("eager", "anchor", "float16"),
        ("graph", "neighbour", "bfloat16"),
        ("xla", "anchor", "float32"),
    ],
)
def test_moments_of_any_magnitude(run, reference, dtype):
    shape = (7, 9, 11)
    values = np.random.default_rng(0).uniform(1, 2, shape) * np.resize([1, -1], shape)
    errors = [tf.cast(magnitude * values, dtype) for magnitude in MAGNITUDES[dtype]]
    one = tf.constant([0.2, 1.4])
    summed = 5e-6 if run == "xla" else 1e-6  # XLA adds one entry after the other in float32
    rounding = {"float32": summed, "float16": 2.0**-11 + summed, "bfloat16": 2.0**-8 + summed}[dtype]
    for error in errors:
        exact = np.asarray(error).astype(np.float64)
        root = root_mean_square(exact)
        rules = [ErrorModulation(1.0, 1e38, reference) for _ in range(2)]
        # It becomes the scale of the error of 1 below it; below an error of 1, it is divided out.
        upper, scaled = descend(rules, [error, one], RUNS[run])
        assert_same_bits(upper, error)
        np.testing.assert_allclose(scaled, root * np.array([0.2, 1.4]), rtol=summed)
        normalized = np.asarray(descend(rules, [one, error], RUNS[run])[1]).astype(np.float64)
        np.testing.assert_allclose(normalized, exact / root, rtol=rounding)


@pytest.mark.parametrize(("run", "rtol"), [("graph", 1e-6), ("xla", 1e-4)])  # XLA adds one entry after the other in float32
def test_moment_of_a_large_tensor(run, rtol):
    error = np.random.default_rng(0).uniform(0.5, 1.5, (64, 64, 64, 32)).astype("float32")
    rules = [ErrorModulation(1.0), ErrorModulation(1.0)]
    _, scaled = descend(rules, [error, np.ones(1, "float32")], RUNS[run])
    np.testing.assert_allclose(scaled, [root_mean_square(error)], rtol)


@pytest.mark.parametrize(("run", "reference"), [("eager", "neighbour"), ("graph", "anchor"), ("xla", "neighbour")])
def test_unusable_errors_pass_and_leave_the_reference(run, reference):
    values = [[0.0, -0.0], [-np.inf, 1.0], [np.nan, np.inf]]
    one = tf.ones(5)
    for dtype in ("float32", "float16"):
        unusable = [tf.constant(pair, dtype) for pair in values]
        errors = [8 * one, *unusable, one, *unusable]
        rules = [ErrorModulation(2.0, reference=reference) for _ in errors]
        assert_same_bits(descend(rules, errors, RUNS[run]), [8 * one, *unusable, 8 * one, *unusable])
        # With nothing usable above it, a layer is the topmost.
        assert_same_bits(descend(rules[:5], [*unusable, one, 8 * one], RUNS[run]), [*unusable, one, one])


@pytest.mark.parametrize(("run", "dtype"), [("eager", "bfloat16"), ("graph", "float16"), ("xla", "float32")])
def test_subnormal_entries_pass_unchanged_where_nothing_fires(run, dtype):
    patterns = np.array([1, 2, 3, 0x8005, 0x0200], "uint16")  # subnormals of the half types
    subnormal = (patterns.astype("uint32") << 16).view("float32") if dtype == "float32" else tf.bitcast(patterns, dtype)
    error = tf.concat([subnormal, tf.ones(4, dtype)], 0)
    assert np.count_nonzero(bits(error)) == 9
    for enabled in (True, False):
        rules = [ErrorModulation(2.0, enabled=enabled) for _ in range(2)]
        assert_same_bits(descend(rules, [error, error], RUNS[run]), [error, error])


# The switch


@every_reference
def test_a_disabled_layer_passes_errors_and_still_hands_its_reference_down(reference):
    one = tf.ones(5)
    rules = [ErrorModulation(2.0, reference=reference, enabled=enabled) for enabled in (True, False, True)]
    expected = 32 * one if reference == "neighbour" else 8 * one
    assert_same_bits(descend(rules, [8 * one, 32 * one, one]), [8 * one, 32 * one, expected])


class SwitchOff(keras.callbacks.Callback):
    """Turns modulation off after the first step, and keeps the weights as they were before and after every step."""

    def __init__(self, traces):
        super().__init__()
        self.weights, self.traces, self.seen = [], traces, []

    def on_train_batch_begin(self, step, logs=None):
        if step == 0:
            self.weights.append(self.model.get_weights())

    def on_train_batch_end(self, step, logs=None):
        self.weights.append(self.model.get_weights())
        self.seen.append(len(self.traces))
        switch_modulation(self.model, False)


def assert_steps_follow(steps, model, batches, tolerances):
    """Each SGD step of rate 1 is the mean of the oracle's gradients over that step's per-replica batches."""
    for before, after, tolerance in zip(steps, steps[1:], tolerances):
        model.set_weights(before)
        found = [references.modulated_gradients(model, x, y, "abc", tolerance, 1000.0, "anchor")[0] for x, y in batches]
        for variable, old, new in zip(model.trainable_variables, before, after, strict=True):
            expected = np.mean([gradient[variable.path] for gradient in found], axis=0)
            np.testing.assert_allclose(old - new, expected, 1e-4, 5e-6, err_msg=variable.path)  # weights up to 20


@pytest.mark.parametrize("settings", [{}, {"run_eagerly": True}, {"jit_compile": True}], ids=str)
def test_switch_during_fit(settings):
    model = dense_chain()
    modulated = modulate(model, tolerance=1.0)
    traces = []

    def loss(y, logits):
        traces.append(1)
        return references.mean_crossentropy(tf.cast(y, tf.int64), logits)

    modulated.compile(keras.optimizers.SGD(1.0), loss, **settings)
    x, y = batch(8, 6)
    switch = SwitchOff(traces)
    modulated.fit(np.tile(x, (3, 1)), np.tile(y, 3), batch_size=8, shuffle=False, verbose=0, callbacks=[switch])
    assert_steps_follow(switch.weights, model, [(x, y)], [1.0, 1e9, 1e9])
    switch_modulation(modulated, True)
    switch = SwitchOff(traces)
    modulated.fit(x, y, batch_size=8, verbose=0, callbacks=[switch])  # on again
    assert_steps_follow(switch.weights, model, [(x, y)], [1.0])
    assert not any(layer.enabled for layer in modulations(modulated))
    if not settings.get("run_eagerly"):
        assert len(traces) == switch.seen[0]


@pytest.mark.parametrize("synchronized", [False, True])
def test_a_mirrored_strategy(two_replicas, synchronized):
    with two_replicas.scope():
        modulated = modulate(dense_chain(), tolerance=1.0, synchronized=synchronized)
        modulated.compile(keras.optimizers.SGD(1.0), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = batch(8, 6)
    x[4:] *= 5  # so that the replicas' moments differ
    switch = SwitchOff([])
    modulated.fit(np.tile(x, (2, 1)), np.tile(y, 2), batch_size=8, shuffle=False, verbose=0, callbacks=[switch])
    model = dense_chain()
    whole, replicas = [(x, y)], [(x[:4], y[:4]), (x[4:], y[4:])]
    right, wrong = (whole, replicas) if synchronized else (replicas, whole)
    assert_steps_follow(switch.weights, model, right, [1.0, 1e9])
    with pytest.raises(AssertionError, match="a/kernel"):
        assert_steps_follow(switch.weights, model, wrong, [1.0])


def test_switch_needs_something_to_switch():
    with pytest.raises(ValueError, match="must have ErrorModulation layers: call modulate first"):
        switch_modulation(dense_chain(), True)
