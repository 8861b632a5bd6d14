"""The signal report as a callback: measured again and again while a model trains."""

import dataclasses
import math
import os
import pathlib
import random
import time

import keras
import numpy as np
import tensorflow as tf

from ortho_keras.diagnosis.plots import errors_by_step, plot_heat_map
from ortho_keras.diagnosis.signal_report import Probe
from ortho_keras.diagnosis.signals import append_rows, read_signals
from ortho_keras.method.checks import check_number, require
from ortho_keras.method.errors import first_line
from ortho_keras.method.files import whole_file
from ortho_keras.method.modulation import ErrorModulation
from ortho_keras.method.state import StepCounter, copy_state, steps_taken


class SignalMonitor(keras.callbacks.Callback):
    """Measures what `signal_report` measures on one fixed batch, again and again during training.

    It writes into `directory`: `signals.csv`, one line for each layer and step, as training proceeds; TensorBoard scalars; and
    at the end `signals.png`, a heat map of the error's magnitude, layer by step. It does not change the training. A run that
    resumes keeps the lines of the steps before, also where a callback such as `BackupAndRestore` restores the state. A model
    that is compiled again, which resets the optimizer's count, continues to count its steps in a second `fit` with the same
    object. Otherwise a model at step 0 starts a new file. A measurement is taken as soon as all of them together, `share`, have
    at most `max_share` of the time since training began, and always at the first step and the last.

    In a keras-tuner search, which copies callbacks for each trial, the files of a trial are in
    `directory/<trial id>/execution<number>`, as those of Keras's `TensorBoard` are.

    Args:
        x, y: As in `signal_report`; 64 to 128 samples are enough.
        directory: Path of a folder; made if missing.
        loss: As in `signal_report`. Defaults to `None`, the compiled model's.
        every: int, at least 1, a multiple of the model's `steps_per_execution`. The steps that are multiples of it are
            measured, by a run that resumes between them too. Defaults to `None`, as often as `max_share` allows.
        max_share: float, above 0. The largest share of training time, where `every` is `None`.
        singular_values: bool. Whether to compute singular values, which is slower.

    Raises:
        ImportError: If tensorboard or matplotlib is not installed.
        ValueError: If an argument is not as above; for `x`, `y` and `loss`, when the first step begins.

    Example:

    >>> model.fit(x, y, callbacks=[SignalMonitor(x[:64], y[:64], "signals")])

    Reference:
        The curves of Xie, Xiong, Pu 2017 ([arXiv:1703.01827](https://arxiv.org/abs/1703.01827)), Fig. 2 and 3, for every layer.
    """

    def __init__(self, x, y, directory, loss=None, every=None, max_share=0.02, singular_values=False):
        super().__init__()
        if every is not None:
            check_number("every", every, least=1, integer=True)
        check_number("max_share", max_share, above=0)
        if not isinstance(directory, (str, os.PathLike)) or (os.path.exists(directory) and not os.path.isdir(directory)):
            raise ValueError(f"`directory` must be the path of a folder. Received: directory={directory!r}")
        require("SignalMonitor", "tensorboard", "matplotlib")
        self.x, self.y, self.loss = x, y, loss
        self.log_dir = directory
        self.every, self.max_share, self.singular_values = every, max_share, singular_values
        self._probe = self._recorded = self._counter = None  # what the probe is of: a model, its optimizer and loss
        self._counted = (None, None)  # the model and optimizer of the last training
        self._earlier = 0  # steps that the model had taken under earlier optimizers
        self._spent = self._duration = 0.0

    @property
    def share(self):
        """The share of the last training's time that measurements, recording the graph and the plot took; 0 before."""
        return self._spent / max(self._duration, 1e-9)

    def __deepcopy__(self, memo):
        """For keras-tuner, which sets `log_dir` of a trial's copies of callbacks whose class has the name `TensorBoard`."""
        copied = object.__new__(type("TensorBoard", (type(self),), {}))
        vars(copied).update(vars(self))
        return copied

    def on_train_begin(self, logs=None):
        self._began, self._spent, self._counter = time.perf_counter(), 0.0, None

    def on_train_batch_begin(self, batch, logs=None):
        if not self._counter:
            self._prepare()  # not before: another callback's `on_train_begin` may bring weights and steps back
        self._counter.begin(batch)

    def _prepare(self):
        began, model, step = time.perf_counter(), self.model, self._steps()
        counter = StepCounter(model)
        counter.check_multiple("every", self.every or counter.interval)
        recorded = (model, model.optimizer, model.loss if self.loss is None else self.loss)
        directory = pathlib.Path(self.log_dir)
        self._path = directory / "signals.csv"
        self._rows = [row for row in read_signals(self._path) if row["step"] <= step] if step else []
        if not model.built:
            model.build(np.shape(self.x))
        report = None
        if self._recorded != recorded or not self._rows or self._rows[-1]["step"] != step:
            self._recorded, self._probe, self._rule = None, self._new_probe(), ErrorModulation()
            self._spent = time.perf_counter() - began
            if not self.every or step % self.every == 0 or not self._rows:
                self._rows = [row for row in self._rows if row["step"] < step]
                report = self._report(step)
        self._seen, self._counter, self._recorded = step, counter, recorded
        self._earlier, self._counted = step - steps_taken(model), recorded[:2]
        directory.mkdir(parents=True, exist_ok=True)
        self._writer = tf.summary.create_file_writer(str(directory / "tensorboard"))
        self._columns = list(self._rows[0]) if self._rows else ["step", *dataclasses.asdict(report.layers[0])]
        with whole_file(self._path) as part:
            append_rows(part, self._rows, self._columns)
        if report:
            self._write(report)

    def _steps(self):
        """The model's steps, those before it was compiled again included."""
        (model, optimizer), steps = self._counted, self._counter.steps if self._counter else steps_taken(self.model)
        if model is not self.model:
            return steps
        if optimizer is not model.optimizer and not steps:  # one that has steps was restored, and counts all of them
            steps = int(optimizer.iterations.numpy())
        return self._earlier + steps

    def on_train_batch_end(self, batch, logs=None):
        self._counter.end(batch)
        self._duration = time.perf_counter() - self._began
        before, self._seen = self._seen, self._steps()
        if self.every:
            due = before // self.every < self._seen // self.every
        else:
            due = self._spent + self._latest <= self.max_share * self._duration
        if due:
            self._write(self._report(self._seen))

    def steps_to_due(self, step):
        """Returns how many more steps a loop may take in one call, after `step` of them."""
        return self.every - step % self.every if self.every else math.inf

    def on_train_end(self, logs=None):
        self.on_train_batch_begin(0)  # where training took no step
        step = self._steps()
        if step > self._rows[-1]["step"]:
            self._write(self._report(step))
        self._earlier = step - steps_taken(self.model)
        drawing = time.perf_counter()
        self._writer.close()
        title = f"{self.model.name}: magnitude of the backpropagated error"
        plot_heat_map(*errors_by_step(self._rows), self._path.with_name("signals.png"), title)
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
        self._started, self._step = time.perf_counter(), step
        if self._probe.model is not self.model:
            copy_state(self.model, self._probe.model)
            for layer, copied in zip(self.model.layers, self._probe.model.layers):
                if isinstance(layer, ErrorModulation):
                    copied.enabled = layer.enabled
        return self._probe.measure(self._rule, self.singular_values)

    def _write(self, report):
        rows = [{"step": self._step, **dataclasses.asdict(layer)} for layer in report.layers]
        append_rows(self._path, rows, self._columns)
        self._rows += rows
        with self._writer.as_default(step=self._step):
            tf.summary.scalar("signal/growth_per_layer", report.growth[1])
            for layer in report.layers:
                for field in dataclasses.fields(layer):
                    if field.metadata["scalar"]:
                        tf.summary.scalar(f"{field.name}/{layer.name}", getattr(layer, field.name))
        self._writer.flush()
        self._latest = time.perf_counter() - self._started
        self._spent += self._latest


def _copied(model):
    """Returns a clone outside of the strategy, which Keras compiles as the model is."""
    state = random.getstate()  # Keras seeds new layers from it
    try:
        copied = keras.models.clone_model(model)
    except Exception as error:  # a custom layer, loss or metric may raise anything
        expected = "SignalMonitor needs, under a strategy, a model that `keras.models.clone_model` can copy, and its losses"
        raise ValueError(f"{expected}. Received: a model with loss={model.loss!r} ({first_line(error)})") from error
    finally:
        random.setstate(state)
    copied.optimizer = None  # its variables take memory
    return copied
