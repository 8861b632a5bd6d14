"""The training loop: one step under any strategy, from any step on, with what a long run needs around it."""

import contextlib
import datetime
import signal
import sys
import threading
import time

import keras
import numpy as np
import tensorflow as tf

from ortho_keras.method.errors import InputError, Interrupted, NonFiniteLossError
from ortho_keras.nets.batchnorm import BatchNormalizationEstimator
from ortho_keras.trainer.checkpoints import restore_checkpoint, save_checkpoint, state_variables
from ortho_keras.trainer.data import evaluation_batches, training_batches
from ortho_keras.trainer.runtime import Runtime
from ortho_keras.trainer.steps import score_function, train_function

FEW_CLASSES = 10  # top-5 accuracy says something where there are more
PACE_AFTER = 30.0  # seconds of steps before it is said how long the rest takes
LEAST_LOSS_SCALE = 2.0**-10  # float16's own range is used up long before


class Trainer:
    """Trains a model by a recipe, so that a run which was stopped anywhere goes on as if it had not been.

    `model.fit` is not used: it cannot start within an epoch, and it fails under `MultiWorkerMirroredStrategy` (Keras 3.15).
    The loop is the same for one device, several and several machines: each replica takes its share of the global batch, the
    cross-entropy is the mean over the global batch, and the penalty counts once.

    Args:
        model: Compiled classifier that returns logits, built under the runtime's strategy.
        recipe: `Recipe`.
        data: `ImageData`.
        directory: Path of the run, for checkpoints and TensorBoard's logs.
        total_steps: int.
        runtime: `Runtime`.
        callbacks: List of `keras.callbacks.Callback`, called as `fit` does on every worker. `model.stop_training` ends the run.
        keep_checkpoints: int, how many are kept.
        log: Function that takes a line; the chief's only.
        end_step: int, the step to stop after, at the end of an epoch; `None`: `total_steps`.
        checkpoints: Path of the folder of checkpoints; `None`: the one of this name in `directory`.
    """

    def __init__(
        self,
        model,
        recipe,
        data,
        directory,
        total_steps,
        runtime=None,
        callbacks=(),
        keep_checkpoints=2,
        log=print,
        end_step=None,
        checkpoints=None,
    ):
        self.model = model
        self.recipe = recipe
        self.data = data
        self.directory = directory
        self.checkpoints = checkpoints or directory / "checkpoints"
        self.total_steps = total_steps
        self.end_step = end_step or total_steps
        self.runtime = runtime or Runtime()
        self.keep_checkpoints = keep_checkpoints
        self.log = log if self.runtime.is_chief else lambda line: None
        self.steps_per_epoch = len(data.train) // recipe.batch_size
        self.epochs = -(-total_steps // self.steps_per_epoch)
        self.mean = np.asarray(data.channel_statistics[0], np.float32)
        self.estimator = BatchNormalizationEstimator(model)
        self.callbacks = callbacks
        self._train = train_function(model, recipe.batch_size, recipe.label_smoothing, self.runtime)
        self._score = score_function(model, self.runtime)
        self._told = set()
        self._pace_told = False

    def run(self, begun=None):
        """Trains to the last step and returns the history: a list of one dict of figures for each epoch.

        Args:
            begun: What `restore` returned; or, where the net has grown, the same of the steps before.

        Raises:
            NonFiniteLossError: At the first step whose loss is inf or NaN, or where float16 finds no scale for the gradients.
            Interrupted: After SIGINT or SIGTERM on any worker, when the checkpoint is written.
        """
        callbacks = keras.callbacks.CallbackList(list(self.callbacks), model=self.model, epochs=self.epochs)
        step, history, epoch = begun or (0, [], new_epoch())
        self._build_optimizer()
        make_writer = tf.summary.create_file_writer if self.runtime.is_chief else lambda _: tf.summary.create_noop_writer()
        writer = make_writer(str(self.directory / "tensorboard"))
        with writer.as_default(), _stop_requests() as stop:
            batches = iter(self._training_batches(step, self.end_step))
            callbacks.on_train_begin()
            while step < self.end_step and not self.model.stop_training:
                step, stopped = self._epoch(step, batches, history, epoch, stop, callbacks)
                history.append(self._epoch_figures(step, epoch))
                epoch = new_epoch()
                self._write_summary(history[-1])
                self._save(step, history, epoch)
                callbacks.on_epoch_end(history[-1]["epoch"] - 1, history[-1])
                if stopped and step < self.total_steps:
                    raise self._interrupted(step, stop)
            callbacks.on_train_end(history[-1] if history else None)
        return history

    def evaluate(self, split, mirrored=False):
        """Returns `crossentropy` and `accuracy` on a split, and the `penalty`, as floats; `top5_accuracy` of many classes.

        With `mirrored`, `mirrored_accuracy` too, see `score_function`. BatchNormalization's averages are re-estimated first
        (`estimate`).
        """
        self.estimate()
        score = score_function(self.model, self.runtime, mirrored=True) if mirrored else self._score
        batch_size = min(self.recipe.batch_size, -(-len(split) // self.runtime.replicas) * self.runtime.replicas)
        totals = 0.0
        for batch in self._distributed(lambda own: evaluation_batches(split, batch_size, self.runtime.replicas, own)):
            totals += score(*batch).numpy().astype(np.float64)
        self._tell_skipped()
        crossentropy, correct, among, count, *rest = totals
        if not count:
            raise InputError(f"--dataset must hold images that decode. Received: {len(split)} that do not")
        figures = {"crossentropy": crossentropy / count, "accuracy": correct / count, "penalty": float(sum(self.model.losses))}
        if mirrored:
            figures["mirrored_accuracy"] = rest[0] / count
        return figures | ({"top5_accuracy": among / count} if len(self.data.class_names) > FEW_CLASSES else {})

    def estimate(self):
        """Re-estimates BatchNormalization's averages, if the recipe says so, from the same training batches each time."""
        if self.recipe.bn_batches:
            self.estimator(images for images, _ in self._training_batches(0, self.recipe.bn_batches))

    def _tell_skipped(self):
        """Names the images that were found not to decode since the last time."""
        new = [name for name in self.data.skipped if name not in self._told]
        self._told.update(new)
        for name in new:
            self.log(f"skipped, as it does not decode: {name}")

    def images(self, count):
        """Returns the first training images, as they are trained on: an array of `count` of them, or all of the first epoch."""
        batches = self._batches(0, min(-(-count // self.recipe.batch_size), self.steps_per_epoch), 1, (0,))
        return np.concatenate([images.numpy() for images, _ in batches])[:count]

    def _training_batches(self, start, stop):
        return self._distributed(lambda own: self._batches(start, stop, self.runtime.replicas, own))

    def _batches(self, start, stop, replicas, own):
        r = self.recipe
        pad = self.mean if r.padding == "mean" else r.padding
        settings = (r.batch_size, r.augment, r.seed, start, stop, pad, r.crop_border, replicas, own, r.cutout, self.mean)
        return training_batches(self.data.train, *settings)

    def _distributed(self, make):
        """The dataset that `make` makes of a list of replicas' numbers, each replica's share handed to it."""
        if self.runtime.replicas == 1:
            return make([0])
        count = self.runtime.local_replicas
        own = [self.runtime.worker * count + index for index in range(count)]
        return self.runtime.strategy.distribute_datasets_from_function(lambda _: make(own))

    def restore(self):
        """Sets the model to the chief's newest checkpoint on all workers.

        Returns:
            Steps, history and the figures of the epoch that was begun; `None` where there is no checkpoint.
        """
        self._build_optimizer()
        step, history, epoch, runtime = -1, [], new_epoch(), self.runtime
        if runtime.is_chief:
            restored = restore_checkpoint(self.checkpoints, self.model, self.log)
            if restored:
                step, (history, begun) = restored
                epoch |= begun
                self.log(f"resuming after step {step} of {self.total_steps}")
        if runtime.workers > 1:
            variables = state_variables(self.model)
            own = [np.asarray(v, np.float64).ravel() * runtime.is_chief for v in variables]  # exact: no type is wider
            state = runtime.sum(np.concatenate([[step * runtime.is_chief], *own]))
            step, at = int(state[0]), 1
            for variable, size in zip(variables, map(np.size, own)):
                variable.assign(state[at : at + size].reshape(variable.shape))
                at += size
        return None if step < 0 else (step, history, epoch)

    def _build_optimizer(self):
        if not self.model.optimizer.built:
            with self.runtime.strategy.scope():
                self.model.optimizer.build(self.model.trainable_variables)

    def _save(self, step, history, epoch):
        if self.runtime.replicas > 1 and not self.recipe.bn_sync:
            _average_over_replicas(self.estimator.averages, self.runtime.strategy)
        if self.runtime.is_chief:
            save_checkpoint(self.checkpoints, self.model, step, [history, epoch], self.keep_checkpoints)

    def _epoch(self, step, batches, history, epoch, stop, callbacks):
        """Runs to the end of the epoch that `step` lies in; returns the step reached and whether its last step saw a stop.

        Sums up in `epoch`. A stop before the epoch's end writes a checkpoint and raises `Interrupted`.
        """
        number = step // self.steps_per_epoch
        begin = number * self.steps_per_epoch
        end = min(begin + self.steps_per_epoch, self.total_steps)
        batch_size, names = self.recipe.batch_size, ["loss", "crossentropy", "accuracy", "penalty", "images/s"]
        show = self.runtime.is_chief and sys.stdout.isatty()
        bar = keras.utils.Progbar(end - begin, stateful_metrics=names, verbose=1 if show else 0)
        if show:
            self.log(f"epoch {number + 1}/{self.epochs}")
        callbacks.on_epoch_begin(number)
        started, first, traced, stopped = time.perf_counter() - epoch["seconds"], None, 0.0, 0.0
        while step < end and not self.model.stop_training:
            callbacks.on_train_batch_begin(step)
            smoothed, crossentropy, correct, penalty, stopped = self._train(*next(batches), float(stop.signum > 0)).numpy()
            step += 1
            if not np.isfinite(smoothed + penalty):
                raise NonFiniteLossError(
                    f"the loss became {smoothed / batch_size + penalty} at step {step} of {self.total_steps}: try a lower "
                    f"--learning_rate ({self.recipe.learning_rate} now), --warmup_steps, or --modulation anchor"
                )
            epoch["steps"] += 1
            epoch["smoothed"] += float(smoothed) / batch_size
            epoch["crossentropy"] += float(crossentropy) / batch_size
            epoch["accuracy"] += float(correct) / batch_size
            logs = {name: epoch[name] / epoch["steps"] for name in ("crossentropy", "accuracy")}
            logs |= {"penalty": float(penalty), "loss": epoch["smoothed"] / epoch["steps"] + float(penalty)}
            now = time.perf_counter()
            if first is None:
                first, traced = step, now  # the first step traces the graph: its time is not a step's
            else:
                logs["images/s"] = (step - first) * batch_size / (now - traced)
                if not show and now - traced > PACE_AFTER:
                    self._tell_pace(step, (now - traced) / (step - first))
            bar.update(step - begin, [(name, logs[name]) for name in names if name in logs])
            callbacks.on_train_batch_end(step - 1, logs)
            epoch |= {"seconds": now - started, "logs": logs}
            if stopped and step < end:
                self._save(step, history, epoch)
                raise self._interrupted(step, stop)
        return step, bool(stopped)

    def _tell_pace(self, step, seconds):
        """Says once how long the rest takes: where a log has no progress bar, an epoch can be hours of silence."""
        if not self._pace_told:
            self._pace_told, left = True, self.end_step - step
            time_left = datetime.timedelta(seconds=round(left * seconds))
            which = "that are left" if self.end_step == self.total_steps else f"of {self.recipe.depth} layers that are left"
            self.log(f"{seconds:.3g} s a step: the {left} steps {which} take about {time_left}")

    def _interrupted(self, step, stop):
        return Interrupted(f"stopped after step {step} of {self.total_steps}", stop.signum or signal.SIGTERM)

    def _epoch_figures(self, step, epoch):
        number = -(-step // self.steps_per_epoch)
        figures = {"epoch": number, "step": step, "seconds": epoch["seconds"], **epoch["logs"]}
        figures["learning_rate"] = float(self.model.optimizer.learning_rate)
        if isinstance(self.model.optimizer, keras.optimizers.LossScaleOptimizer):
            figures["loss_scale"] = float(tf.convert_to_tensor(self.model.optimizer.dynamic_scale.value))
            if figures["loss_scale"] < LEAST_LOSS_SCALE:
                raise NonFiniteLossError(
                    f"the loss scale fell to {figures['loss_scale']} by step {step}: gradients are not finite at any scale; "
                    "try --precision mixed_bfloat16 or float32"
                )
        if self.data.validation and (step == self.total_steps or number % self.recipe.evaluate_every == 0):
            validation = self.evaluate(self.data.validation)
            figures |= {f"validation_{name}": value for name, value in validation.items() if name != "penalty"}
        self._tell_skipped()
        parts = [f"epoch {number}/{self.epochs}", f"step {step}", f"{figures['seconds']:.1f}s"]
        shown = ["images/s", "loss", "penalty", "accuracy", "validation_accuracy", "validation_top5_accuracy"]
        shown += ["learning_rate", "loss_scale"]
        parts += [f"{name} {figures[name]:.4g}" for name in shown if name in figures]
        self.log(" - ".join(parts))
        return figures

    def _write_summary(self, figures):
        for name, value in figures.items():
            if name not in ("epoch", "step"):
                tf.summary.scalar(name.replace("validation_", "validation/"), value, step=figures["step"])


def new_epoch():
    """What an epoch sums up: steps, seconds, and over steps the batch means of both cross-entropies and of accuracy."""
    return {"steps": 0, "seconds": 0.0, "smoothed": 0.0, "crossentropy": 0.0, "accuracy": 0.0, "logs": {}}


def _average_over_replicas(variables, strategy):
    """Sets each replica's copy to the mean over replicas: without synchronized statistics they drift apart."""

    @tf.function
    def means():
        copies = strategy.run(lambda: [tf.identity(v.value) for v in variables])
        return [strategy.reduce(tf.distribute.ReduceOp.MEAN, copy, axis=None) for copy in copies]

    for variable, mean in zip(variables, means()):
        variable.assign(mean)


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
