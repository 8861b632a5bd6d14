"""What is watched while a model trains."""

import copy
import csv
import dataclasses
import os
import pathlib
import random
import time
import warnings

import keras
import numpy as np
import tensorflow as tf

from ortho_keras.diagnosis.plots import plot_heat_map
from ortho_keras.diagnosis.signal_report import Probe
from ortho_keras.diagnosis.signals import LayerSignal
from ortho_keras.method.errors import first_line
from ortho_keras.method.files import whole_file
from ortho_keras.method.layer_state import copy_state
from ortho_keras.method.live import steps_taken
from ortho_keras.method.modulation import ErrorModulation
from ortho_keras.method.optional import require

_SUMMARIES = ("error_to_top", "gradient_ratio", "mean_abs_cosine", "image_share", "dead_share")


COLUMNS = ("step", *(field.name for field in dataclasses.fields(LayerSignal)))


class SignalMonitor(keras.callbacks.Callback):
    """Takes `signal_report`'s figures on one fixed batch again and again during training.

    Writes into `directory`: `signals.csv`, one line for each layer and step, as it goes; TensorBoard scalars; and at the end
    `signals.png`, a heat map of the error's magnitude, layer by step. Training itself is not changed: see `signal_report`.
    A run that is taken up again keeps the lines of the steps before, also where a callback (`BackupAndRestore`), before or
    behind this one, brings the state back: the file is read and the first measurement taken when the first step begins.

    By default the cost is bounded: a measurement is taken as soon as it leaves all of them together at `max_share` of the time
    since training began. Before the first step and after the last there is one in any case, which in a short run is more than
    that: the first records the model's graph, some seconds for a hundred layers. `share` is what it came to. A second `fit`
    with the same object and model goes on with what the first one has, and counts on where the model was compiled anew, whose
    optimizer begins at 0. Otherwise a step is the optimizer's, and a model at step 0 begins the file anew.

    Args:
        x: See `signal_report`; 64 to 128 samples do.
        y: See `signal_report`.
        directory: Path of a folder; made if missing.
        loss: See `signal_report`. Defaults to `None`, the compiled model's.
        every: int, at least 1, steps from one measurement to the next, whatever it costs; or `None`, as often as `max_share`
            allows.
        max_share: float, above 0. The largest share of training time, where `every` is `None`.
        singular_values: bool. See `signal_report`; slower.

    Raises:
        ImportError: If tensorboard or matplotlib is not installed.
        ValueError: If `every` or `max_share` is outside its range, or `directory` is no path of a folder; before the first
            step of training, as `signal_report`, before anything is written.

    Example:

    >>> model.fit(x, y, callbacks=[SignalMonitor(x[:64], y[:64], "signals")])

    Reference:
        The curves of Xie, Xiong, Pu 2017 ([arXiv:1703.01827](https://arxiv.org/abs/1703.01827)), Fig. 2 and 3, for every layer.
    """

    def __init__(self, x, y, directory, loss=None, every=None, max_share=0.02, singular_values=False):
        super().__init__()
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f"`every` must be an integer, at least 1, or None. Received: every={every!r}")
        if isinstance(max_share, bool) or not isinstance(max_share, (int, float)) or not max_share > 0:
            raise ValueError(f"`max_share` must be a number above 0. Received: max_share={max_share!r}")
        if not isinstance(directory, (str, os.PathLike)) or (os.path.exists(directory) and not os.path.isdir(directory)):
            raise ValueError(f"`directory` must be the path of a folder. Received: directory={directory!r}")
        require("SignalMonitor", "tensorboard", "matplotlib")
        self.x = x
        self.y = y
        self.directory = pathlib.Path(directory)
        self.loss = loss
        self.every = every
        self.max_share = max_share
        self.singular_values = singular_values
        self._probe = self._recorded = None  # what the probe is of: a model, its optimizer and loss
        self._counted = (None, None, 0)  # a model, its optimizer, and the steps that it had taken under others
        self._spent = self._duration = 0.0

    @property
    def path(self):
        return self.directory / "signals.csv"

    @property
    def share(self):
        """Time of the measurements (and of the graph's recording and the picture) over that of the last training; 0 before."""
        return self._spent / max(self._duration, 1e-9)

    def on_train_begin(self, logs=None):
        self._began, self._spent, self._ready = time.perf_counter(), 0.0, False

    def on_train_batch_begin(self, batch, logs=None):
        if not self._ready:
            self._prepare()  # not before: another callback's `on_train_begin` may bring weights and steps back

    def _prepare(self):
        began, model, optimizer = time.perf_counter(), self.model, self.model.optimizer
        counted = self._counted_on()
        step = counted[-1] + steps_taken(model)
        recorded = (model, optimizer, model.loss if self.loss is None else self.loss)
        self._rows = [row for row in read_signals(self.path) if row["step"] <= step] if step else []
        if not model.built:
            model.build(np.shape(self.x))
        goes_on = self._recorded == recorded and self._rows and self._rows[-1]["step"] == step
        if goes_on:
            self._last = step
        else:
            self._recorded, self._probe, self._rule = None, self._new_probe(), ErrorModulation()
            self._spent = time.perf_counter() - began
            self._rows = [row for row in self._rows if row["step"] < step]
            report = self._report(step)
            self._recorded = recorded
        self.directory.mkdir(parents=True, exist_ok=True)
        self._writer = tf.summary.create_file_writer(str(self.directory / "tensorboard"))
        with whole_file(self.path) as own, own.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self._rows)
        self._counted, self._ready = counted, True
        if not goes_on:
            self._write(report)
        self._duration = time.perf_counter() - self._began

    def _counted_on(self):
        """What `_counted` is from now on."""
        (model, before, offset), optimizer = self._counted, self.model.optimizer
        if model is not self.model:
            offset = 0
        elif before is not optimizer and not steps_taken(model):  # a new one with steps was restored, and counts them all
            offset += int(before.iterations.numpy())
        return self.model, optimizer, offset

    def _steps(self):
        return self._counted[-1] + steps_taken(self.model)

    def __deepcopy__(self, memo):
        arguments = (self.x, self.y, self.directory, self.loss, self.every, self.max_share, self.singular_values)
        return type(self)(*copy.deepcopy(arguments, memo))

    def on_train_batch_end(self, batch, logs=None):
        self._duration = time.perf_counter() - self._began
        if self.every is None:
            due = self._spent + self._latest <= self.max_share * self._duration
        else:
            due = self._steps() - self._last >= self.every
        if due:
            self._write(self._report(self._steps()))

    def on_train_end(self, logs=None):
        if not self._ready:  # no step was left
            self._prepare()
        if self._steps() > self._last:
            self._write(self._report(self._steps()))
        drawing = time.perf_counter()
        self._writer.close()
        steps = {step: column for column, step in enumerate(sorted({row["step"] for row in self._rows}))}
        newest_first = sorted(self._rows, key=lambda row: -row["step"])  # the order is that of the net as it is now
        names = {name: line for line, name in enumerate(dict.fromkeys(row["name"] for row in newest_first))}
        ratios = np.full((len(names), len(steps)), np.nan)
        for row in self._rows:
            ratios[names[row["name"]], steps[row["step"]]] = row["error_to_top"]
        plot_heat_map(
            list(steps), list(names), ratios, self.directory / "signals.png", f"{self.model.name}: the error on its way down"
        )
        self._spent += time.perf_counter() - drawing
        self._duration = time.perf_counter() - self._began

    def _new_probe(self):
        model = self.model
        if model.distribute_strategy.num_replicas_in_sync > 1:
            # One replica cannot be differentiated alone: a copy outside the strategy takes its weights at each measurement.
            if tf.distribute.has_strategy():
                raise ValueError("SignalMonitor needs `fit` to be called outside of `strategy.scope()`")
            model = _copied(model)
        return Probe(model, self.x, self.y, self.loss)

    def _report(self, step):
        self._started, self._last = time.perf_counter(), step
        if self._probe.model is not self.model:
            copy_state(self.model, self._probe.model)
            for layer, copied in zip(self.model.layers, self._probe.model.layers):
                if isinstance(layer, ErrorModulation):
                    copied.enabled = layer.enabled
        return self._probe.measure(self._rule, self.singular_values)

    def _write(self, report):
        rows = [{"step": self._last, **dataclasses.asdict(layer)} for layer in report.layers]
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, list(rows[0])).writerows(rows)
        self._rows += rows
        with self._writer.as_default(step=self._last):
            tf.summary.scalar("signal/growth_per_layer", report.growth[1])
            for layer in report.layers:
                for name in _SUMMARIES:
                    tf.summary.scalar(f"{name}/{layer.name}", getattr(layer, name))
        self._writer.flush()
        self._latest = time.perf_counter() - self._started
        self._spent += self._latest


def _copied(model):
    """Returns a clone outside of the strategy, compiled with the model's losses and their weights."""
    state = random.getstate()  # Keras seeds new layers from it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras warns of a lambda, which it refuses then
            copied = keras.models.clone_model(model)
            weights = keras.saving.deserialize_keras_object(model.get_compile_config()["loss_weights"])
    except Exception as error:  # a layer, a loss, a metric of one's own may raise anything
        raise ValueError(
            "SignalMonitor needs, under a strategy, a model that `keras.models.clone_model` can copy, with what it is compiled "
            f"with. Received: a model with loss={model.loss!r} ({first_line(error)})"
        ) from error
    finally:
        random.setstate(state)
    copied.compile(loss=model.loss, loss_weights=weights)  # the very losses, and no optimizer with its variables
    return copied


def read_signals(path):
    """Reads a `signals.csv`: a list of dicts, `step` an int, the figures floats; empty if there is none.

    A last line that a killed run left half-written is dropped.

    Raises:
        ValueError: If the file has other columns.
    """
    try:
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames and tuple(reader.fieldnames) != COLUMNS:
                raise ValueError(
                    f"`path` must be a file with the columns {COLUMNS}. Received: {path}, with {reader.fieldnames}"
                )
            lines = list(reader)
    except FileNotFoundError:
        return []
    types = {field.name: field.type for field in dataclasses.fields(LayerSignal)} | {"step": int}
    rows = []
    for line in lines:
        if None in line or None in line.values():
            continue
        read = {bool: lambda text: text == "True"}
        rows.append({name: read.get(types[name], types[name])(value) for name, value in line.items()})
    return rows
