"""SignalMonitor in a real `fit`: what it writes, what it leaves alone, what it may cost."""

import copy

import keras
import matplotlib.image
import numpy as np
import pytest
import tensorflow as tf
from reports import LOGITS

import ortho_keras
from ortho_keras.diagnosis import plots
from ortho_keras.diagnosis.signals import read_signals

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(64, 8, 8, 1)).astype("float32"), RNG.integers(10, size=64)
BATCH = X[:16], Y[:16]


def compiled(seed=0, built=True):
    keras.utils.set_random_seed(seed)
    conv = keras.layers.Conv2D(3, 3, activation="relu", name="conv")
    stack = [conv, keras.layers.BatchNormalization(), keras.layers.Flatten(), keras.layers.Dense(10, name="top")]
    model = keras.Sequential([keras.Input((8, 8, 1)), *stack] if built else stack)
    model.compile(keras.optimizers.SGD(0.05), LOGITS)
    return model


def fit(model, *callbacks, epochs=1):
    """Eight steps an epoch."""
    keras.utils.set_random_seed(3)
    model.fit(X, Y, batch_size=8, epochs=epochs, callbacks=list(callbacks), verbose=0)


def monitor(directory, **options):
    return ortho_keras.SignalMonitor(*BATCH, directory, **options)


def lines(directory, name="conv"):
    """A layer's lines by step."""
    return {row["step"]: row for row in read_signals(directory / "signals.csv") if row["name"] == name}


def assert_same(row, layer, *names):
    for name in ("backward_moment", "gradient_ratio", *names):
        assert row[name] == pytest.approx(getattr(layer, name), rel=1e-4)


def assert_of(row, model):
    assert_same(row, ortho_keras.signal_report(model, *BATCH, LOGITS, singular_values=False).layers[0], "forward_moment")


def test_what_it_writes_and_that_training_stays_the_same(tmp_path):
    model, without = compiled(), compiled()
    before = ortho_keras.signal_report(model, *BATCH, singular_values=False)
    watch = monitor(tmp_path / "signals", every=5)
    fit(model, watch, epochs=2)
    fit(without, epochs=2)
    for mine, theirs in zip(model.get_weights(), without.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    after = ortho_keras.signal_report(model, *BATCH, singular_values=False)
    rows = read_signals(tmp_path / "signals" / "signals.csv")
    assert [row["step"] for row in rows] == [step for step in (0, 5, 10, 15, 16) for _ in range(2)]
    for some, report in ((rows[:2], before), (rows[-2:], after)):
        for row, layer in zip(some, report.layers, strict=True):
            np.testing.assert_equal({name: row[name] for name in vars(layer)}, vars(layer))
    picture = matplotlib.image.imread(tmp_path / "signals" / "signals.png")
    assert len(np.unique(picture[..., :3].reshape(-1, 3), axis=0)) > 30
    files = [str(path) for path in (tmp_path / "signals" / "tensorboard").iterdir()]
    events = [event for path in files for event in tf.compat.v1.train.summary_iterator(path)]
    tags = [(value.tag, event.step) for event in events for value in event.summary.value]
    for tag in ("signal/growth_per_layer", "error_to_top/conv", "gradient_ratio/top"):
        assert [step for name, step in tags if name == tag] == [0, 5, 10, 15, 16]
    assert "mean_cosine/conv" not in dict(tags)  # a column that is no scalar
    assert 0 < watch.share < 1 and watch.share == watch.share  # of a training that is over


def test_the_share_of_time_holds_measurements_back(tmp_path):
    for share, steps in ((1e-9, [0, 8]), (1e9, list(range(9)))):
        fit(compiled(built=False), monitor(tmp_path, max_share=share))
        assert list(lines(tmp_path)) == steps


def test_a_resumed_run_keeps_its_lines(tmp_path):
    losses = []

    def loss(y, outputs):  # called once in each measurement
        losses.append(LOGITS(y, outputs))
        return losses[-1]

    watch, model = monitor(tmp_path, loss=loss, every=100), compiled()
    for steps in ([0, 8], [0, 8, 16]):  # a second fit does not measure the same weights again
        fit(model, watch)
        assert len(losses) == len(steps) and list(lines(tmp_path)) == steps
    with open(tmp_path / "signals.csv", "a") as file:
        file.write("20,conv,Conv2D,Tr")  # killed while it wrote
    fit(model, copy.deepcopy(monitor(tmp_path, every=3)))
    assert list(lines(tmp_path)) == [0, 8, 16, 18, 21, 24]
    model = compiled()  # another model begins at step 0: another run
    fit(model, monitor(tmp_path), epochs=0)  # which takes no step
    assert list(lines(tmp_path)) == [0] and (tmp_path / "signals.png").exists()
    assert_of(lines(tmp_path)[0], model)


def test_a_model_compiled_again_continues_its_lines(tmp_path):
    watch, model = monitor(tmp_path, every=4), compiled()
    before = {}
    for phase, steps in enumerate(([0, 4, 8], [0, 4, 8, 12, 16], [0, 4, 8, 12, 16, 20, 24])):
        model.get_layer("conv").trainable = phase != 0  # frozen, then released
        model.compile(keras.optimizers.SGD(0.05), LOGITS)
        fit(model, watch)
        found = lines(tmp_path)
        assert list(found) == steps and model.optimizer.iterations == 8
        for step, row in before.items():
            assert row["backward_moment"] == pytest.approx(found[step]["backward_moment"], rel=1e-6)
        assert_of(found[steps[-1]], model)
        before = found
    assert len(read_signals(tmp_path / "signals.csv")) == 7 * 2  # each layer once at each step


class Killed(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if self.model.optimizer.iterations == 14:
            raise KeyboardInterrupt


@pytest.mark.parametrize("same", [False, True], ids=["new objects", "the same objects"])
def test_a_run_that_another_callback_restores_keeps_its_lines(tmp_path, same):
    def objects():
        # The backup is written after each epoch, at a step between two measurements.
        made = [monitor(tmp_path / "signals", every=3), keras.callbacks.BackupAndRestore(tmp_path / "backup")]
        return compiled(), made[::-1] if same else made  # in either order

    model, callbacks = objects()
    with pytest.raises(KeyboardInterrupt):
        fit(model, *callbacks, Killed(), epochs=3)
    before = lines(tmp_path / "signals")
    assert list(before) == [0, 3, 6, 9, 12]
    if not same:
        model, callbacks = compiled(seed=1), objects()[1]
    fit(model, *callbacks, epochs=3)
    after = lines(tmp_path / "signals")
    assert model.optimizer.iterations == 24 and list(after) == list(range(0, 25, 3))
    for step in (0, 3, 6):
        assert after[step]["gradient_ratio"] == pytest.approx(before[step]["gradient_ratio"], rel=1e-4)
    assert_of(after[24], model)


def test_a_trial_of_a_search_has_a_folder_of_its_own(tmp_path):
    import keras_tuner

    def build(hp):
        hidden = [keras.layers.Dense(4) for _ in range(hp.Choice("depth", [1, 2]))]
        model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), *hidden, keras.layers.Dense(10)])
        model.compile("sgd", LOGITS)
        return model

    goal = keras_tuner.Objective("loss", "min")
    tuner = keras_tuner.GridSearch(build, goal, directory=tmp_path, project_name="search")
    tuner.search(*BATCH, epochs=1, verbose=0, callbacks=[monitor(tmp_path / "signals", every=1)])
    assert not (tmp_path / "signals" / "signals.csv").exists()
    for depth, trial in ((1, "0000"), (2, "0001")):
        rows = read_signals(tmp_path / "signals" / trial / "execution0" / "signals.csv")
        assert [row["step"] for row in rows] == [0] * (depth + 1) + [1] * (depth + 1)


def test_under_a_strategy(tmp_path, two_replicas):
    """An adapted layer, the switch of the modulation and the weights are followed."""

    def net():
        keras.utils.set_random_seed(0)
        scaling = keras.layers.Normalization(name="scaling")
        scaling.adapt(100 * X + 500)
        inputs = keras.Input((8, 8, 1))
        x = keras.layers.Dense(10, name="a")(keras.layers.Flatten()(scaling(inputs)))
        model = ortho_keras.modulate(keras.Model(inputs, keras.layers.Dense(10, name="b")(x)), tolerance=1.0)
        model.compile(keras.optimizers.SGD(0.05), LOGITS)
        return model

    with two_replicas.scope():
        model = net()
    x = 100 * X + 500
    callbacks = [ortho_keras.ModulationSwitch(4), ortho_keras.SignalMonitor(x[:16], Y[:16], tmp_path, every=8)]
    model.fit(x, Y, batch_size=8, verbose=0, callbacks=callbacks)
    first, last = net(), net()
    last.set_weights(model.get_weights())
    ortho_keras.switch_modulation(last, False)
    for step, alone, enabled in ((0, first, True), (8, last, False)):
        for layer in ortho_keras.signal_report(alone, x[:16], Y[:16], singular_values=False).layers:
            row = lines(tmp_path, layer.name)[step]
            assert_same(row, layer, "forward_moment", "scale")
            assert row["fired"] == layer.fired == (enabled and layer.name == "a")


def test_the_losses_of_several_outputs(tmp_path, two_replicas):
    loss, weights = {"digit": LOGITS, "size": "mse"}, {"digit": 1.0, "size": 0.5}
    sizes = RNG.normal(size=(64, 1)).astype("float32")
    y = [Y[:16], sizes[:16]]

    def net():
        keras.utils.set_random_seed(4)
        inputs = keras.Input((8, 8, 1))
        dense = keras.layers.Dense(6, "relu", activity_regularizer="l2", kernel_regularizer="l2", name="hidden")
        x = dense(keras.layers.Flatten()(inputs))
        return keras.Model(inputs, [keras.layers.Dense(10, name="digit")(x), keras.layers.Dense(1, name="size")(x)])

    def trained(*callbacks):
        with two_replicas.scope():
            model = net()
            model.compile(keras.optimizers.SGD(0.05), loss, loss_weights=weights)
        history = model.fit(X, [Y, sizes], batch_size=16, shuffle=False, callbacks=list(callbacks), verbose=0)
        return model, history.history

    def both(y, outputs):
        return LOGITS(y[0], outputs[0]) + 0.5 * tf.reduce_mean(tf.square(y[1] - outputs[1]))

    _, history = trained(ortho_keras.SignalMonitor(X[:16], y, tmp_path, every=5))
    expected, expected_history = trained()
    assert history == expected_history  # the losses of both outputs, too, that Keras counts
    for step, same in ((0, net()), (4, expected)):
        copied = net()  # outside of the strategy
        copied.set_weights(same.get_weights())
        for layer in ortho_keras.signal_report(copied, X[:16], y, both, singular_values=False).layers:
            assert_same(lines(tmp_path, layer.name)[step], layer)


def test_what_does_not_fit_leaves_an_earlier_file_alone(tmp_path, two_replicas):
    (tmp_path / "signals.csv").write_text("mine,too\n")
    for x, y in ((X[:16], Y[:15]), (X[:16, :5], Y[:16])):
        for directory in (tmp_path, tmp_path / "new"):
            with pytest.raises(ValueError, match="`[xy]` must .* Received: "):
                fit(compiled(), ortho_keras.SignalMonitor(x, y, directory))
    model = compiled()
    model.optimizer.iterations.assign(3)
    with pytest.raises(ValueError, match="`path` must be a file with the columns step and name"):
        fit(model, monitor(tmp_path))
    with two_replicas.scope():
        model = compiled()
        model.compile(keras.optimizers.SGD(0.05), lambda y, outputs: LOGITS(y, outputs))  # which Keras cannot copy
    with pytest.raises(ValueError, match="SignalMonitor needs, under a strategy, a model that .* Received: a model with loss="):
        fit(model, monitor(tmp_path / "new"))
    assert (tmp_path / "signals.csv").read_text() == "mine,too\n" and not (tmp_path / "new").exists()
    for option in ({"every": 0}, {"max_share": float("nan")}, {"directory": tmp_path / "signals.csv"}, {"directory": None}):
        (name,) = option
        with pytest.raises(ValueError, match=f"`{name}` must be .* Received: {name}="):
            monitor(**{"directory": tmp_path, **option})


def draw(monkeypatch, *arguments):
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    plots.plot_heat_map(*arguments, "map.png", "title")
    return figures[0].axes[0]


def test_axes_are_labelled_and_no_legend_covers_them(monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    for length in (1, 9):
        row = {"crossentropy": 2.0, "validation_crossentropy": 1.5, "accuracy": 0.1, "validation_accuracy": 0.9, "penalty": 0.0}
        plots.plot_curves([{"step": step, **row} for step in range(length)], "curves.png", "title")
    for values in (True, False):
        model = ortho_keras.plain_cnn(8, (8, 8, 1), width=2, seed=0)
        report = ortho_keras.signal_report(model, X[:8], Y[:8], LOGITS, singular_values=values)
        report.plot("signal.png")
    for figure in figures:
        figure.draw_without_rendering()
        places = [axes.get_window_extent() for axes in figure.axes]
        legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
        assert legends and all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes)
        for legend in legends:
            box = legend.get_window_extent().padded(-3)
            assert not box.count_overlaps(places) and box.xmax < figure.bbox.xmax and box.ymin > 0
    assert figures[0].axes[2].get_yscale() == "linear" and figures[0].axes[0].get_yscale() == "log"  # a penalty of 0
    assert [len(figure.axes[2].texts) for figure in figures[2:]] == [0, 1]  # that there are no singular values


def test_a_heat_map_names_layers_and_steps_evenly(monkeypatch):
    layers, steps = 110, 250
    names, at = [f"layer{index}" for index in range(layers)], [100 * index for index in range(steps)]
    axes = draw(monkeypatch, at, names, np.ones((layers, steps)))
    for axis, labels, most in ((axes.xaxis, list(map(str, at)), 10), (axes.yaxis, names, 22)):
        ticks = axis.get_ticklocs()
        assert len(ticks) <= most < 2 * len(ticks) and len(set(np.diff(ticks))) == 1 and ticks[0] == 0 and axis.get_label_text()
        assert [text.get_text() for text in axis.get_ticklabels()] == [labels[int(tick)] for tick in ticks]


def test_the_heat_map_of_a_net_that_grew(monkeypatch):
    nets = {0: "az", 5: "az", 10: "abcz", 15: "acbz", 20: "az"}
    errors = {"a": 1.0, "b": 0.0, "c": 10.0, "z": 1.0}
    rows = [{"step": step, "name": name, "error_to_top": errors[name]} for step, names in nets.items() for name in names]
    steps, names, ratios = plots.errors_by_step(rows)
    assert steps == [0, 5, 10, 15, 20] and names == ["a", "c", "b", "z"]  # of the deepest net, as it was last
    np.testing.assert_array_equal(np.isnan(ratios), [[0] * 5, [1, 1, 0, 0, 1], [1, 1, 0, 0, 1], [0] * 5])
    axes = draw(monkeypatch, steps, names, ratios)
    colors = axes.images[0].to_rgba(axes.images[0].get_array())
    none, zero, same, ten = colors[1, 0], colors[2, 2], colors[0, 0], colors[1, 2]
    assert none[3] == 0 and axes.patch.get_hatch() and same[:3].min() > 0.95 and same[3] == 1  # hatched where it shows through
    assert zero[2] > zero[0] + 0.2 and ten[0] > ten[2] + 0.2  # blue and red
