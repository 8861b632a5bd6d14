"""SignalMonitor in a real `fit`: what it writes, what it leaves alone, what it may cost."""

import contextlib
import copy
import functools

import keras
import matplotlib.image
import numpy as np
import pytest
import tensorflow as tf

import ortho_keras
from ortho_keras.diagnosis import plots
from ortho_keras.diagnosis.monitor import read_signals

LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(64, 8, 8, 1)).astype("float32"), RNG.integers(10, size=64)


def compiled(seed=0):
    model = ortho_keras.plain_cnn(8, (8, 8, 1), seed=seed)
    model.compile(keras.optimizers.SGD(0.05), LOGITS)
    return model


def fit(model, *callbacks, epochs=2):
    keras.utils.set_random_seed(3)
    model.fit(X, Y, batch_size=8, epochs=epochs, callbacks=list(callbacks), verbose=0)


def test_what_it_writes(tmp_path):
    model = compiled()
    before = ortho_keras.signal_report(model, X[:16], Y[:16], singular_values=False)
    monitor = ortho_keras.SignalMonitor(X[:16], Y[:16], tmp_path / "signals", every=5)
    fit(model, monitor)
    after = ortho_keras.signal_report(model, X[:16], Y[:16], singular_values=False)
    rows = read_signals(tmp_path / "signals" / "signals.csv")
    assert sorted({row["step"] for row in rows}) == [0, 5, 10, 15, 16]
    for step, report in ((0, before), (16, after)):
        mine = [row for row in rows if row["step"] == step]
        assert [row["name"] for row in mine] == [layer.name for layer in report.layers]
        assert [row["backward_moment"] for row in mine] == [layer.backward_moment for layer in report.layers]
        assert [row["fired"] for row in mine] == [layer.fired for layer in report.layers]
    picture = matplotlib.image.imread(tmp_path / "signals" / "signals.png")
    assert len(np.unique(picture[..., :3].reshape(-1, 3), axis=0)) > 30
    files = list((tmp_path / "signals" / "tensorboard").iterdir())
    values = [v.tag for file in files for event in tf.compat.v1.train.summary_iterator(str(file)) for v in event.summary.value]
    assert values.count("signal/growth_per_layer") == 5 and values.count("error_to_top/stem_conv") == 5
    assert 0 < monitor.share < 1


def test_training_is_the_same_with_and_without(tmp_path):
    with_monitor, without = compiled(), compiled()
    fit(with_monitor, ortho_keras.SignalMonitor(X[:16], Y[:16], tmp_path, every=1))
    fit(without)
    for mine, theirs in zip(with_monitor.get_weights(), without.get_weights()):
        np.testing.assert_array_equal(mine, theirs)


def test_the_share_of_time_holds_measurements_back(tmp_path):
    for share, steps in ((1e-9, [0, 16]), (1e9, list(range(17)))):
        fit(compiled(), ortho_keras.SignalMonitor(X[:16], Y[:16], tmp_path, max_share=share))
        assert sorted({row["step"] for row in read_signals(tmp_path / "signals.csv")}) == steps


def test_a_run_that_goes_on_keeps_its_lines(tmp_path):
    model = compiled()
    fit(model, ortho_keras.SignalMonitor(X[:16], Y[:16], tmp_path, every=4), epochs=1)
    with open(tmp_path / "signals.csv", "a") as file:
        file.write("12,stem_conv,Conv2D,Tr")  # killed while it wrote
    fit(model, ortho_keras.SignalMonitor(X[:16], Y[:16], tmp_path, every=4), epochs=1)
    steps = [row["step"] for row in read_signals(tmp_path / "signals.csv") if row["name"] == "stem_conv"]
    assert steps == [0, 4, 8, 12, 16]


def test_a_copy_works(tmp_path):
    monitor = copy.deepcopy(ortho_keras.SignalMonitor(X[:16], Y[:16], tmp_path / "first"))
    fit(compiled(), monitor, epochs=1)
    assert (tmp_path / "first" / "signals.png").exists()
    used = copy.deepcopy(monitor)
    used.directory = tmp_path / "second"
    fit(compiled(), used, epochs=1)
    assert (tmp_path / "second" / "signals.png").exists()


def test_a_second_fit_does_not_measure_the_same_weights_again(tmp_path):
    losses = []

    def loss(y, outputs):  # called once in each measurement
        losses.append(LOGITS(y, outputs))
        return losses[-1]

    monitor, model = ortho_keras.SignalMonitor(X[:16], Y[:16], tmp_path, loss, every=100), compiled()
    for steps in ([0, 8], [0, 8, 16]):
        fit(model, monitor, epochs=1)
        assert len(losses) == len(steps)
        rows = read_signals(tmp_path / "signals.csv")
        assert [row["step"] for row in rows if row["name"] == "stem_conv"] == steps
    share = monitor.share
    assert 0 < share == monitor.share  # of the training, which is over


def stem(path):
    """The first convolution's lines by step."""
    return {row["step"]: row for row in read_signals(path / "signals.csv") if row["name"] == "stem_conv"}


def assert_of(row, model):
    layer = ortho_keras.signal_report(model, X[:16], Y[:16], LOGITS, singular_values=False).layers[0]
    for name in ("forward_moment", "backward_moment", "gradient_ratio"):
        assert row[name] == pytest.approx(getattr(layer, name), rel=1e-4)


def test_a_model_compiled_anew_goes_on_with_the_lines_of_before(tmp_path):
    monitor, model = ortho_keras.SignalMonitor(X[:16], Y[:16], tmp_path, every=4), compiled()
    before = {}
    for phase, steps in enumerate(([0, 4, 8], [0, 4, 8, 12, 16], [0, 4, 8, 12, 16, 20, 24])):
        model.get_layer("stem_conv").trainable = phase != 0  # frozen, then set free
        model.compile(keras.optimizers.SGD(0.05), LOGITS)
        fit(model, monitor, epochs=1)
        lines = stem(tmp_path)
        assert list(lines) == steps and model.optimizer.iterations == 8
        for step, row in before.items():
            assert row["backward_moment"] == pytest.approx(lines[step]["backward_moment"], rel=1e-6)
        assert_of(lines[steps[-1]], model)
        before = lines
    with open(tmp_path / "signals.csv") as file:
        assert len(file.readlines()) == 1 + 7 * 8  # each layer once at each step
    fit(compiled(), monitor, epochs=1)  # another model is another run
    assert list(stem(tmp_path)) == [0, 4, 8]


class Killed(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if self.model.optimizer.iterations == 14:
            raise KeyboardInterrupt


@pytest.mark.parametrize("first", ["monitor", "backup"])
@pytest.mark.parametrize("same", [False, True], ids=["new objects", "the same objects"])
def test_a_run_that_another_callback_takes_up_again_keeps_its_lines(tmp_path, first, same):
    def objects():
        made = [
            ortho_keras.SignalMonitor(X[:16], Y[:16], tmp_path / "signals", every=4),
            keras.callbacks.BackupAndRestore(tmp_path / "backup"),  # after each epoch, of 8 steps
        ]
        return compiled(), made if first == "monitor" else made[::-1]

    model, callbacks = objects()
    with pytest.raises(KeyboardInterrupt):
        fit(model, *callbacks, Killed(), epochs=3)
    before = stem(tmp_path / "signals")
    assert list(before) == [0, 4, 8, 12]
    if not same:
        model, callbacks = compiled(seed=1), objects()[1]
    fit(model, *callbacks, epochs=3)
    after = stem(tmp_path / "signals")
    assert model.optimizer.iterations == 24 and list(after) == [0, 4, 8, 12, 16, 20, 24]
    for step in (0, 4, 8):  # at 8 the weights came back, and were measured as what they are
        for name in ("forward_moment", "backward_moment", "gradient_ratio"):
            assert after[step][name] == pytest.approx(before[step][name], rel=1e-4)
    assert_of(after[24], model)


def test_a_training_without_a_step(tmp_path):
    model = compiled()
    fit(model, ortho_keras.SignalMonitor(X[:16], Y[:16], tmp_path), epochs=0)
    lines = stem(tmp_path)
    assert list(lines) == [0] and (tmp_path / "signals.png").exists()
    assert_of(lines[0], model)


def test_a_batch_that_does_not_fit_leaves_an_earlier_file_alone(tmp_path):
    fit(compiled(), ortho_keras.SignalMonitor(X[:16], Y[:16], tmp_path))
    before = (tmp_path / "signals.csv").read_text()
    for x, y in ((X[:16], Y[:15]), (X[:16, :5], Y[:16])):
        with pytest.raises(ValueError, match="`[xy]` must .* Received: "):
            fit(compiled(), ortho_keras.SignalMonitor(x, y, tmp_path))
        with pytest.raises(ValueError, match="`[xy]` must .* Received: "):
            fit(compiled(), ortho_keras.SignalMonitor(x, y, tmp_path / "new"))
    assert (tmp_path / "signals.csv").read_text() == before and not (tmp_path / "new").exists()


def test_a_directory_that_is_none(tmp_path):
    (tmp_path / "file").write_text("mine")
    for directory in (tmp_path / "file", None, 3):
        with pytest.raises(ValueError, match="`directory` must be the path of a folder. Received: directory="):
            ortho_keras.SignalMonitor(X[:16], Y[:16], directory)


def test_a_file_with_other_columns_is_refused(tmp_path):
    model = compiled()
    fit(model, epochs=1)
    (tmp_path / "signals.csv").write_text("step,name\n3,conv\n")
    with pytest.raises(ValueError, match="must be a file with the columns"):
        fit(model, ortho_keras.SignalMonitor(X[:16], Y[:16], tmp_path), epochs=1)
    assert (tmp_path / "signals.csv").read_text() == "step,name\n3,conv\n"


def test_under_a_strategy(tmp_path, two_replicas):
    with two_replicas.scope():
        model = ortho_keras.plain_cnn(8, (8, 8, 1), bn_synchronized=True, seed=0)
        model.compile(keras.optimizers.SGD(0.05), LOGITS)
    expected = ortho_keras.signal_report(compiled(), X[:16], Y[:16], singular_values=False)
    fit(model, ortho_keras.SignalMonitor(X[:16], Y[:16], tmp_path), epochs=1)
    first = [row for row in read_signals(tmp_path / "signals.csv") if row["step"] == 0]
    np.testing.assert_allclose(
        [row["backward_moment"] for row in first], [layer.backward_moment for layer in expected.layers], rtol=1e-4
    )


def test_under_a_strategy_an_adapted_normalization_is_followed(tmp_path, two_replicas):
    with two_replicas.scope():
        scaling = keras.layers.Normalization(name="scaling")
        scaling.adapt(100 * X + 500)
        dense = keras.layers.Dense(10, name="dense")
        model = keras.Sequential([keras.Input((8, 8, 1)), scaling, keras.layers.Flatten(), dense])
        model.compile(keras.optimizers.SGD(0.0), LOGITS)
    monitor = ortho_keras.SignalMonitor(100 * X[:16] + 500, Y[:16], tmp_path)
    model.fit(100 * X + 500, Y, batch_size=16, verbose=0, callbacks=[monitor])
    scaled = (X[:16] - X.mean()) / X.std()  # of the one channel
    expected = np.mean(np.square(scaled.reshape(16, -1).astype(np.float64) @ dense.kernel.numpy()))
    assert read_signals(tmp_path / "signals.csv")[0]["forward_moment"] == pytest.approx(expected, rel=1e-4)


def test_under_a_strategy_a_switch_of_the_modulation_is_followed(tmp_path, two_replicas):
    with two_replicas.scope():
        model = ortho_keras.modulate(ortho_keras.plain_cnn(8, (8, 8, 1), seed=0), tolerance=1.0)
        model.compile(keras.optimizers.SGD(0.05), LOGITS)
    fit(model, ortho_keras.ModulationSwitch(4), ortho_keras.SignalMonitor(X[:16], Y[:16], tmp_path, every=8), epochs=1)
    rows = read_signals(tmp_path / "signals.csv")
    assert any(row["fired"] for row in rows if row["step"] == 0)
    assert rows[-1]["step"] == 8 and not any(row["fired"] for row in rows if row["step"] == 8)


def two_outputs():
    keras.utils.set_random_seed(4)
    inputs = keras.Input((8, 8, 1))
    x = keras.layers.Dense(6, activation="relu", activity_regularizer="l2", kernel_regularizer="l2")(
        keras.layers.Flatten()(inputs)
    )
    return keras.Model(inputs, [keras.layers.Dense(10, name="digit")(x), keras.layers.Dense(1, name="size")(x)])


SEVERAL = {
    "list": ([LOGITS, "mse"], [1.0, 0.5]),
    "dict": ({"digit": LOGITS, "size": "mse"}, {"digit": 1.0, "size": 0.5}),
    "own": ([LOGITS, lambda y, outputs: 0.5 * tf.square(y - outputs)], None),
}


@pytest.mark.parametrize("case,strategy", [("list", False), ("dict", False), ("own", False), ("list", True), ("dict", True)])
def test_the_losses_of_several_outputs(tmp_path, two_replicas, case, strategy):
    loss, weights = SEVERAL[case]
    sizes = RNG.normal(size=(64, 1)).astype("float32")

    def trained(*callbacks):
        with two_replicas.scope() if strategy else contextlib.nullcontext():
            model = two_outputs()
            model.compile(keras.optimizers.SGD(0.05), loss, loss_weights=weights)
        history = model.fit(X, [Y, sizes], batch_size=8, epochs=2, shuffle=False, callbacks=list(callbacks), verbose=0)
        return model, history.history

    def both(y, outputs):
        return LOGITS(y[0], outputs[0]) + 0.5 * tf.reduce_mean(tf.square(y[1] - outputs[1]))

    y = [Y[:16], sizes[:16]]
    _, history = trained(ortho_keras.SignalMonitor(X[:16], y, tmp_path, every=5))
    expected, expected_history = trained()
    assert history == expected_history  # the losses of both outputs, too, that Keras counts
    rows = read_signals(tmp_path / "signals.csv")
    assert sorted({row["step"] for row in rows}) == [0, 5, 10, 15, 16]
    for step, same in ((0, two_outputs()), (16, expected)):
        copied = two_outputs()  # outside of the strategy
        copied.set_weights(same.get_weights())
        report = ortho_keras.signal_report(copied, X[:16], y, both, singular_values=False)
        mine = [row for row in rows if row["step"] == step]
        np.testing.assert_allclose(
            [row["backward_moment"] for row in mine], [layer.backward_moment for layer in report.layers], rtol=1e-4
        )
        np.testing.assert_allclose(
            [row["gradient_ratio"] for row in mine], [layer.gradient_ratio for layer in report.layers], rtol=1e-4
        )


def test_one_loss_in_a_list(tmp_path):
    model = ortho_keras.plain_cnn(8, (8, 8, 1), seed=0)
    model.compile(keras.optimizers.SGD(0.05), [LOGITS])
    expected = ortho_keras.signal_report(model, X[:16], Y[:16], LOGITS, singular_values=False)
    fit(model, ortho_keras.SignalMonitor(X[:16], Y[:16], tmp_path), epochs=1)
    first = [row["backward_moment"] for row in read_signals(tmp_path / "signals.csv") if row["step"] == 0]
    np.testing.assert_allclose(first, [layer.backward_moment for layer in expected.layers], rtol=1e-5)


@pytest.mark.parametrize("loss", [functools.partial(LOGITS), lambda y, outputs: LOGITS(y, outputs)], ids=["partial", "lambda"])
def test_under_a_strategy_a_loss_that_keras_cannot_copy(tmp_path, two_replicas, loss):
    with two_replicas.scope():
        model = ortho_keras.plain_cnn(8, (8, 8, 1), seed=0)
        model.compile(keras.optimizers.SGD(0.05), loss)
    with pytest.raises(
        ValueError, match="SignalMonitor needs, under a strategy, a model that .* Received: a model with loss=<?func"
    ):
        fit(model, ortho_keras.SignalMonitor(X[:16], Y[:16], tmp_path / "new"), epochs=1)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"every": 0}, "`every` must be an integer, at least 1, or None. Received: every=0"),
        ({"every": 2.5}, "`every` must be an integer"),
        ({"max_share": 0}, "`max_share` must be a number above 0. Received: max_share=0"),
        ({"max_share": float("nan")}, "`max_share` must be a number above 0"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        ortho_keras.SignalMonitor(X, Y, tmp_path, **arguments)


@pytest.mark.parametrize(("layers", "steps"), [(3, 1), (22, 12), (44, 13), (110, 250)])
def test_a_heat_map_names_layers_and_steps_evenly(monkeypatch, layers, steps):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    names, at = [f"layer{index}" for index in range(layers)], [100 * index for index in range(steps)]
    plots.plot_heat_map(at, names, np.ones((layers, steps)), "map.png", "title")
    axes = figures[0].axes[0]
    for axis, labels, most in ((axes.xaxis, list(map(str, at)), 12), (axes.yaxis, names, 22)):
        ticks = axis.get_ticklocs()
        assert len(ticks) <= most and (len(ticks) == len(labels) or most < 2 * len(ticks))
        assert len(set(np.diff(ticks))) <= 1 and ticks[0] == 0
        assert [text.get_text() for text in axis.get_ticklabels()] == [labels[int(tick)] for tick in ticks]
