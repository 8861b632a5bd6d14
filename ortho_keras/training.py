"""The training loop: Keras's own train step, run from any step on, with what a long run needs around it."""

import contextlib
import signal
import sys
import threading
import time

import keras
import numpy as np
import tensorflow as tf

from ortho_keras.batchnorm import BatchNormalizationEstimator
from ortho_keras.checkpoints import restore_checkpoint, save_checkpoint
from ortho_keras.data import evaluation_batches, training_batches
from ortho_keras.errors import Interrupted, NonFiniteLossError


class Trainer:
    """Trains a compiled model by a recipe, so that a run which was stopped anywhere goes on as if it had not been.

    `model.fit` is not used: it cannot start within an epoch, and it fails under `MultiWorkerMirroredStrategy` (Keras 3.15).

    Args:
        model: Model compiled with the loss and the metrics `crossentropy` and `accuracy`.
        recipe: `Recipe`.
        data: `ImageData`.
        directory: Path of the run, for checkpoints and TensorBoard's logs.
        total_steps: int.
        log: Function that takes a line.
    """

    def __init__(self, model, recipe, data, directory, total_steps, log=print):
        self.model = model
        self.recipe = recipe
        self.data = data
        self.directory = directory
        self.total_steps = total_steps
        self.log = log
        self.steps_per_epoch = len(data.train) // recipe.batch_size
        self.mean = np.asarray(data.channel_statistics()[0], np.float32)
        self.estimator = BatchNormalizationEstimator(model)
        self._train = tf.function(model.train_step)
        self._test = tf.function(model.test_step, reduce_retracing=True)

    def run(self):
        """Trains to the last step and returns the history: a list of one dict of figures for each epoch.

        Raises:
            NonFiniteLossError: At the first step whose loss is inf or NaN.
            Interrupted: After SIGINT or SIGTERM, when the checkpoint is written.
        """
        self.model.optimizer.build(self.model.trainable_variables)
        step, history, seconds = 0, [], 0.0
        restored = restore_checkpoint(self.directory / "checkpoints", self.model, self.log)
        if restored:
            step, (history, seconds) = restored
            self.log(f"resuming after step {step} of {self.total_steps}")
        batches = iter(self._training_batches(step, self.total_steps))
        writer = tf.summary.create_file_writer(str(self.directory / "tensorboard"))
        with writer.as_default(), _stop_requests() as stop:
            while step < self.total_steps:
                step, seconds = self._epoch(step, batches, history, seconds, stop)
                history.append(self._epoch_figures(step, seconds))
                seconds = 0.0
                self._write_summary(history[-1])
                save_checkpoint(self.directory / "checkpoints", self.model, step, [history, seconds])
        return history

    def evaluate(self, split):
        """Returns `loss` (with the penalty), `crossentropy` and `accuracy` on a split, as floats.

        BatchNormalization's averages are re-estimated first, from the same training batches each time.
        """
        if self.recipe.bn_batches:
            self.estimator(images for images, _ in self._training_batches(0, self.recipe.bn_batches))
        self.model.reset_metrics()
        for batch in evaluation_batches(split, self.recipe.batch_size):
            logs = self._test(batch)
        return {name: float(value) for name, value in logs.items()}

    def _training_batches(self, start, stop):
        recipe = self.recipe
        return training_batches(self.data.train, recipe.batch_size, recipe.augment, recipe.seed, start, stop, self.mean)

    def _epoch(self, step, batches, history, seconds, stop):
        """Runs to the end of the epoch that `step` lies in, and returns the step reached and the seconds spent."""
        end = min((step // self.steps_per_epoch + 1) * self.steps_per_epoch, self.total_steps)
        begin = end - self.steps_per_epoch if end % self.steps_per_epoch == 0 else end - end % self.steps_per_epoch
        if step == begin:
            self.model.reset_metrics()
        verbose = 1 if sys.stdout.isatty() else 0
        names = ["loss", "crossentropy", "accuracy", "penalty", "images/s"]
        bar = keras.utils.Progbar(end - begin, stateful_metrics=names, verbose=verbose)
        if verbose:
            self.log(f"epoch {len(history) + 1}/{-(-self.total_steps // self.steps_per_epoch)}")
        started, first, traced = time.perf_counter() - seconds, None, 0.0
        while step < end:
            logs = {name: float(value) for name, value in self._train(next(batches)).items()}
            step += 1
            if not np.isfinite(logs["loss"]):
                raise NonFiniteLossError(
                    f"the loss became {logs['loss']} at step {step} of {self.total_steps}: try a lower --learning_rate "
                    f"({self.recipe.learning_rate} now), --warmup_steps, or --modulation anchor"
                )
            now = time.perf_counter()
            if first is None:
                first, traced = step, now  # the first step traces the graph: its time is not a step's
            else:
                logs["images/s"] = (step - first) * self.recipe.batch_size / (now - traced)
            logs["penalty"] = logs["loss"] - logs["crossentropy"]
            bar.update(step - begin, [(name, logs[name]) for name in names if name in logs])
            self.logs = logs
            if stop.signum:
                seconds = time.perf_counter() - started
                save_checkpoint(self.directory / "checkpoints", self.model, step, [history, seconds])
                raise Interrupted(f"stopped after step {step} of {self.total_steps}", stop.signum)
        return step, time.perf_counter() - started

    def _epoch_figures(self, step, seconds):
        epoch = -(-step // self.steps_per_epoch)
        figures = {"epoch": epoch, "step": step, "seconds": seconds, **self.logs}
        figures["learning_rate"] = float(self.model.optimizer.learning_rate)
        if step == self.total_steps or epoch % self.recipe.evaluate_every == 0:
            validation = self.evaluate(self.data.validation)
            figures |= {f"validation_{name}": validation[name] for name in ("crossentropy", "accuracy")}
        parts = [f"epoch {epoch}", f"step {step}", f"{seconds:.1f}s"]
        shown = ("images/s", "loss", "penalty", "accuracy", "validation_accuracy", "learning_rate")
        parts += [f"{name} {figures[name]:.4g}" for name in shown if name in figures]
        self.log(" - ".join(parts))
        return figures

    def _write_summary(self, figures):
        for name, value in figures.items():
            if name not in ("epoch", "step"):
                tf.summary.scalar(name.replace("validation_", "validation/"), value, step=figures["step"])


@contextlib.contextmanager
def _stop_requests():
    """Turns the first SIGINT or SIGTERM into a request, so that a step ends whole; a second SIGINT stops at once."""

    class Stop:
        signum = 0

    def request(signum, frame):
        Stop.signum = signum
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():
        yield Stop  # signals reach the main thread only
        return
    before = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield Stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
