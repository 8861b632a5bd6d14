"""The training loop: the same under any strategy, from any step on, with checkpoints, logs and plots."""

import contextlib
import dataclasses
import datetime
import pathlib
import signal
import sys
import time
import types

import keras
import numpy as np
import tensorflow as tf

from ortho_keras.diagnosis.plots import plot_curves
from ortho_keras.method.errors import InputError, Interrupted, NonFiniteLossError
from ortho_keras.method.files import write_json
from ortho_keras.nets.batchnorm import BatchNormalizationEstimator
from ortho_keras.trainer.checkpoints import restore_checkpoint, save_checkpoint, state_variables
from ortho_keras.trainer.data import BatchSettings, ImageData, evaluation_batches, training_batches
from ortho_keras.trainer.penalty import penalty_interval
from ortho_keras.trainer.progress import Progress
from ortho_keras.trainer.recipe import Recipe
from ortho_keras.trainer.runtime import Runtime
from ortho_keras.trainer.steps import StepsPerCall, score_function, train_function

FEW_CLASSES = 10  # top-5 accuracy is reported for more classes than these
BAR_AFTER = 3.0  # seconds of an evaluation
TRACING = 7.0  # times as long as building a network takes its first step: 7 to 9 at 44 to 302 layers on two cores
DEEP = 100  # layers from which on tracing is announced: below, building is mostly what it costs once, or reading images
DRAW_EVERY = 30.0  # seconds between two drawings of the curves, which take a quarter of one
# The form of a checkpoint's history: a row of metrics for each epoch, and the sums over the one that was begun (`new_epoch`).
HISTORY = [
    [{"epoch": int, "step": int, "seconds": float, "accuracy": float, "penalty": float}],
    {"steps": int, "seconds": float, "smoothed": float, "crossentropy": float, "accuracy": float, "logs": dict},
]
SAVE = 2.0**-10  # the chief's request for a checkpoint, which the step brings to all workers; a request to stop is 1
BEST = "best"  # the folder, among the checkpoints, of that of the highest validation accuracy
LEAST_LOSS_SCALE = 2.0**-10  # float16's own range is used up long before


@dataclasses.dataclass(eq=False)
class Trainer:
    """Trains a model by a recipe. A run that was stopped after any step resumes as if it had not been.

    `model.fit` is not used: it cannot start within an epoch, and it fails under `MultiWorkerMirroredStrategy` (Keras 3.15).
    Each replica takes its share of the global batch, the cross-entropy is the mean over the global batch, and the penalty
    counts once.
    """

    model: keras.Model  # compiled under the runtime's strategy; returns logits
    recipe: Recipe
    data: ImageData
    directory: pathlib.Path  # of the run, for history.json, curves.png, TensorBoard's logs and checkpoints
    total_steps: int
    runtime: Runtime = dataclasses.field(default_factory=Runtime)
    callbacks: list = ()  # called on every worker as `fit` does; `model.stop_training` ends the run
    keep_checkpoints: int = 2
    log: object = print  # takes a line; called by the chief only
    title: str = ""  # of the plot
    stop: types.SimpleNamespace = dataclasses.field(default_factory=lambda: types.SimpleNamespace(signum=0))  # `stop_requests`
    build_seconds: float = 0.0  # that the model took, from which those of the first step are estimated
    checkpoint_minutes: float = 10.0  # after which a checkpoint is written within an epoch
    end_step: int = 0  # the step to stop after, at the end of an epoch; 0: total_steps
    checkpoints: pathlib.Path | None = None  # folder; `None`: "checkpoints" in `directory`

    def __post_init__(self):
        self.checkpoints = self.checkpoints or self.directory / "checkpoints"
        self.end_step = self.end_step or self.total_steps
        self.log = self.log if self.runtime.is_chief else lambda line: None
        self.steps_per_epoch = len(self.data.train) // self.recipe.batch_size
        self.epochs = -(-self.total_steps // self.steps_per_epoch)
        names = ("batch_size", "augment", "seed", "padding", "crop_border", "cutout")
        mean = np.asarray(self.data.channel_statistics[0], np.float32)
        self.settings = BatchSettings(**{name: getattr(self.recipe, name) for name in names}, mean=mean)
        self.estimator = BatchNormalizationEstimator(self.model)
        if not self.model.optimizer.built:
            with self.runtime.strategy.scope():
                self.model.optimizer.build(self.model.trainable_variables)
        self._every, recipe = penalty_interval(self.recipe, self.model), self.recipe
        self._penalty = 0.0 if self._every == 1 else float(sum(self.model.losses))  # the last one that was computed
        self._train = train_function(self.model, recipe.batch_size, recipe.label_smoothing, self.runtime, self._every)
        self._per_call = StepsPerCall(self.callbacks, self.runtime)
        self._score = None
        self._reported, self._draw_after, self._saved = set(), time.monotonic() + DRAW_EVERY, time.monotonic()

    def run(self, begun=None):
        """Trains to the last step and returns the history: a list of one dict of metrics per epoch.

        `begun` is what `restore` returned. Raises `NonFiniteLossError` at the first step whose loss is inf or NaN, and
        `Interrupted` after SIGINT or SIGTERM on any worker, when the checkpoint is written.
        """
        callbacks = keras.callbacks.CallbackList(list(self.callbacks), model=self.model, epochs=self.epochs)
        step, history, epoch = begun or (0, [], new_epoch())
        make_writer = tf.summary.create_file_writer if self.runtime.is_chief else lambda _: tf.summary.create_noop_writer()
        writer = make_writer(str(self.directory / "tensorboard"))
        with writer.as_default(), contextlib.ExitStack() as stack:
            stack.callback(self._write_history, history)
            batches = iter(self._training_batches(step, self.end_step))
            callbacks.on_train_begin()
            if self._per_call.waiting:
                names = ", ".join(type(callback).__name__ for callback in self._per_call.waiting)
                self.log(f"each call of the graph takes one step, not several, because of callbacks at each step: {names}")
            if self._every != max(self.recipe.penalty_every, 1):
                self.log(f"one penalty in {self._every} steps, {self._every} times as large; --penalty_every=1: in each")
            if step < self.end_step:
                self._announce_tracing("the first step")
            # An epoch whose steps are all taken, but which is not evaluated yet, has none left.
            while (step < self.end_step or epoch["steps"]) and not self.model.stop_training:
                ends = -(-step // self.steps_per_epoch) if epoch["steps"] else step // self.steps_per_epoch + 1
                end = min(ends * self.steps_per_epoch, self.total_steps)
                step, stopped = self._epoch(step, end, batches, [history, epoch], callbacks)
                ended = step == end or not stopped
                if ended:
                    history.append(self._epoch_metrics(step, [history, epoch]))
                    epoch = new_epoch()
                    self._write_history(history, last=False)
                self._save(step, [history, epoch])
                if ended:
                    self._log_epoch(history[-1])
                    callbacks.on_epoch_end(history[-1]["epoch"] - 1, history[-1])
                if stopped and step < self.total_steps:
                    signum = self.stop.signum or signal.SIGTERM  # another worker's
                    raise Interrupted(f"stopped after step {step} of {self.total_steps}", signum)
            callbacks.on_train_end(history[-1] if history else None)
        return history

    def evaluate(self, split, mirrored=False, confusion=False):
        """Returns `crossentropy`, `accuracy` and `penalty` as floats; of more than ten classes `top5_accuracy` too.

        With `mirrored`, `mirrored_accuracy` too; with `confusion`, `confusion_matrix`, int64 `(classes, classes)`: see
        `score_function`. Calls `estimate` first. Raises `Interrupted` after SIGINT or SIGTERM, except on several workers.
        """
        if mirrored or confusion or not self._score:
            self._announce_tracing("the evaluation")
        self.estimate()
        self._score = self._score or score_function(self.model, self.runtime)
        score = score_function(self.model, self.runtime, mirrored, confusion) if mirrored or confusion else self._score
        batch_size = min(self.recipe.batch_size, -(-len(split) // self.runtime.replicas) * self.runtime.replicas)
        totals, done, progress = 0.0, 0, Progress(self.runtime, self.log, len(split), quiet=BAR_AFTER)
        batches = self._distributed(lambda own: evaluation_batches(split, batch_size, self.runtime.replicas, own))
        for batch in self._until_stopped(batches):
            totals += score(*batch).numpy().astype(np.float64)
            done = min(done + batch_size, len(split))
            progress.update(done, f"evaluated {done:,} of {len(split):,} images")
        self._report_skipped()
        crossentropy, correct, among, count, *rest = totals
        if not count:
            raise InputError(f"--dataset must hold images that decode. Received: {len(split)} that do not")
        metrics = {"crossentropy": crossentropy / count, "accuracy": correct / count, "penalty": float(sum(self.model.losses))}
        if mirrored:
            metrics["mirrored_accuracy"] = rest.pop() / count
        if confusion:
            classes = len(self.data.class_names)
            metrics["confusion_matrix"] = np.reshape(rest, (classes, classes)).astype(np.int64)
        return metrics | ({"top5_accuracy": among / count} if len(self.data.class_names) > FEW_CLASSES else {})

    def estimate(self):
        """Re-estimates BatchNormalization's averages, if the recipe says so, from the same training batches each time."""
        if self.recipe.bn_batches:
            batches = self._until_stopped(self._training_batches(0, self.recipe.bn_batches))
            self.estimator(images for images, _ in batches)

    def images(self, count):
        """Returns an array of the first `count` training images, augmented, or of all of the first epoch if there are fewer."""
        steps = min(-(-count // self.recipe.batch_size), self.steps_per_epoch)
        batches = training_batches(self.data.train, self.settings, 0, steps)
        return np.concatenate([images.numpy() for images, _ in batches])[:count]

    def restore(self):
        """Sets the model on all workers to the chief's newest checkpoint; returns where it was, or `None` without one."""
        step, history, epoch = -1, [], new_epoch()
        restored = restore_checkpoint(self.checkpoints, self.model, self.log, HISTORY) if self.runtime.is_chief else None
        if restored:
            step, (history, begun) = restored
            if step > self.end_step:
                expected = f"--workdir must hold checkpoints of a run of {self.end_step} steps"
                raise InputError(f"{expected}. Received: {str(self.checkpoints)!r}, with one of step {step}")
            epoch |= begun
            self.log(f"resuming after step {step} of {self.total_steps}")
        if self.runtime.workers > 1:
            variables = state_variables(self.model)
            step, *values = self.runtime.from_chief([step, *variables])
            for variable, value in zip(variables, values):
                variable.assign(value)
        return None if step < 0 else (int(step), history, epoch)

    def _until_stopped(self, batches):
        for batch in batches:
            if self.stop.signum and self.runtime.workers == 1:  # others would wait for this one
                raise Interrupted("stopped in an evaluation", self.stop.signum)
            yield batch

    def _announce_tracing(self, what):
        if self.recipe.depth >= DEEP:
            self.log(f"tracing {what} (about {self.build_seconds * TRACING:.0f} s for {self.recipe.depth} layers)")

    def _training_batches(self, start, stop):
        replicas = self.runtime.replicas
        return self._distributed(lambda own: training_batches(self.data.train, self.settings, start, stop, replicas, own))

    def _distributed(self, make):
        """Distributes the dataset that `make` returns for a list of replicas' numbers."""
        if self.runtime.replicas == 1:
            return make([0])
        count = self.runtime.local_replicas
        own = [self.runtime.worker * count + index for index in range(count)]
        return self.runtime.strategy.distribute_datasets_from_function(lambda _: make(own))

    def _save(self, step, begun):
        """Writes a checkpoint; replicas' averages become their mean, which matters to a validation without bn_batches."""
        if self.runtime.replicas > 1 and not self.recipe.bn_sync:
            _average_over_replicas(self.estimator.averages, self.runtime.strategy)
        if self.runtime.is_chief:
            history, epoch = begun
            grown = self.recipe.grow_epoch if self.recipe.start_depth else 0  # epochs of a shallower network
            validated = [row.get("validation_accuracy", -1.0) for row in history[grown:]]
            if not epoch["steps"] and validated and validated[-1] > max(validated[:-1], default=-1.0):
                save_checkpoint(self.checkpoints / BEST, self.model, step, history[-1:], keep=1)
            save_checkpoint(self.checkpoints, self.model, step, begun, self.keep_checkpoints)
        self._saved = time.monotonic()

    def _epoch(self, step, end, batches, begun, callbacks):
        """Trains to the end of an epoch or a stop; returns the step reached and whether it stopped.

        `begun` is the list of the history, and of the sums over the epoch, which are updated.
        """
        epoch, due = begun[1], 60 * self.checkpoint_minutes
        begin = (end - 1) // self.steps_per_epoch * self.steps_per_epoch
        batch_size, names = self.recipe.batch_size, ["loss", "accuracy", "images/s", "crossentropy", "penalty"]
        progress = Progress(self.runtime, self.log, end - begin, names)
        if sys.stdout.isatty():  # where a bar follows
            self.log(f"epoch {begin // self.steps_per_epoch + 1}/{self.epochs}")
        callbacks.on_epoch_begin(begin // self.steps_per_epoch)
        first, since, stopped = step, time.perf_counter(), False
        started = since - epoch["seconds"]
        while step < end and not self.model.stop_training and not stopped:
            callbacks.on_train_batch_begin(step)
            save = self.runtime.is_chief and time.monotonic() - self._saved > due
            request = 1.0 if self.stop.signum else SAVE * save
            count, called = min(self._per_call.steps, end - step), time.perf_counter()
            rows = self._train(batches, count, request, self._per_call.wish(step + count)).numpy()
            now = time.perf_counter()
            requests, agreed = rows[-1, -2:]
            self._per_call.update((now - called) / count, agreed)
            for smoothed, crossentropy, correct, penalty, *_ in rows.tolist():
                step += 1
                if not np.isfinite(smoothed + penalty):
                    raise NonFiniteLossError(
                        f"the loss became {smoothed / batch_size + penalty} at step {step} of {self.total_steps}: try a lower "
                        f"--learning_rate ({self.recipe.learning_rate} now), --warmup_steps, or --modulation anchor"
                    )
                self._penalty = penalty / self._every if penalty else self._penalty
                epoch["steps"] += 1
                for name, total in (("smoothed", smoothed), ("crossentropy", crossentropy), ("accuracy", correct)):
                    epoch[name] += total / batch_size
            stopped = requests >= 1
            logs = {name: epoch[name] / epoch["steps"] for name in ("crossentropy", "accuracy")}
            logs |= {"penalty": self._penalty, "loss": epoch["smoothed"] / epoch["steps"] + self._penalty}
            if self._per_call.calls > 1:
                logs["images/s"] = (step - first) * batch_size / (now - since)
            else:  # the first call's time includes the tracing of the graph
                first, since = step, now
            shown = [(name, logs[name]) for name in names if name in logs]
            line = [f"step {step:,} of {self.end_step:,}", *(f"{name} {value:.4g}" for name, value in shown)]
            if "images/s" in logs:
                seconds = round((self.end_step - step) * batch_size / logs["images/s"])
                line.append(f"about {datetime.timedelta(seconds=seconds)} left")
            progress.update(step - begin, " - ".join(line), shown)
            callbacks.on_train_batch_end(step - 1, logs)
            epoch |= {"seconds": now - started, "logs": logs}
            if 0 < requests < 1 and step < end:
                self._save(step, begun)
        return step, stopped

    def _epoch_metrics(self, step, begun):
        number, epoch = -(-step // self.steps_per_epoch), begun[1]
        metrics = {"epoch": number, "step": step, "seconds": epoch["seconds"], **epoch["logs"]}
        metrics["learning_rate"] = float(self.model.optimizer.learning_rate)
        if isinstance(self.model.optimizer, keras.optimizers.LossScaleOptimizer):
            metrics["loss_scale"] = float(tf.convert_to_tensor(self.model.optimizer.dynamic_scale.value))
            if metrics["loss_scale"] < LEAST_LOSS_SCALE:
                raise NonFiniteLossError(
                    f"the loss scale fell to {metrics['loss_scale']} by step {step}: gradients are not finite at any scale; "
                    "try --precision mixed_bfloat16 or float32"
                )
        if self.data.validation and (step == self.total_steps or number % self.recipe.evaluate_every == 0):
            self._save(step, begun)  # an evaluation that is interrupted costs no step
            validation = self.evaluate(self.data.validation)
            metrics |= {f"validation_{name}": value for name, value in validation.items() if name != "penalty"}
        self._report_skipped()
        for name in metrics.keys() - {"epoch", "step"}:
            tf.summary.scalar(name.replace("validation_", "validation/"), metrics[name], step=step)
        return metrics

    def _log_epoch(self, metrics):
        shown = ["images/s", "loss", "penalty", "accuracy", "validation_accuracy", "validation_top5_accuracy"]
        shown += ["learning_rate", "loss_scale"]
        parts = [f"{name} {metrics[name]:.4g}" for name in shown if name in metrics]
        begin = [f"epoch {metrics['epoch']}/{self.epochs}", f"step {metrics['step']}", f"{metrics['seconds']:.1f}s"]
        self.log(" - ".join([*begin, *parts]))

    def _report_skipped(self):
        """Logs the names of the images that were newly found not to decode."""
        new = [name for name in self.data.skipped if name not in self._reported]
        self._reported.update(new)
        for name in new:
            self.log(f"skipped, does not decode: {name}")

    def _write_history(self, history, last=True):
        if history and self.runtime.is_chief:
            write_json(self.directory / "history.json", history)
            if last or time.monotonic() > self._draw_after:
                plot_curves(history, self.directory / "curves.png", self.title)
                self._draw_after = time.monotonic() + DRAW_EVERY


def new_epoch():
    """The sums over an epoch: steps, seconds, and the batch means of both cross-entropies and of accuracy; the last logs."""
    return {"steps": 0, "seconds": 0.0, "smoothed": 0.0, "crossentropy": 0.0, "accuracy": 0.0, "logs": {}}


def _average_over_replicas(variables, strategy):
    """Sets each replica's copy to the mean over replicas: without synchronized statistics they drift apart."""

    @tf.function
    def means():
        copies = strategy.run(lambda: [tf.identity(v.value) for v in variables])
        return [strategy.reduce(tf.distribute.ReduceOp.MEAN, copy, axis=None) for copy in copies]

    for variable, mean in zip(variables, means()):
        variable.assign(mean)
