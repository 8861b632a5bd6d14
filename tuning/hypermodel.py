"""A trial: a point of the search space, trained by the project's own run."""

import json
import math
import pathlib
import signal
import time

import keras
import keras_tuner

from ortho_keras.method.errors import Interrupted, NonFiniteLossError, first_line
from ortho_keras.trainer.build import compiled_model
from ortho_keras.trainer.data import load_data
from ortho_keras.trainer.run import run
from tuning import workers
from tuning.trials import FAILED, FINISHED, HOPELESS, RUNNING, TRIAL_FILE, Trial

MOST_STARTS = 3


class HopelessError(Exception):
    """The trial will come to nothing."""


class SearchStopped(keras_tuner.errors.FatalError):
    """The search was asked to stop, or its time is over; the running trial has written a checkpoint."""

    def __init__(self, message, signum=signal.SIGTERM):
        super().__init__(message)
        self.signum = signum


class RecipeHyperModel(keras_tuner.HyperModel):
    """A recipe whose values are hyperparameters.

    Args:
        space: `SearchSpace`.
        data_dir: See `ortho_keras.experiment.run`.
        name: String, the recipe's name.
        runtime: See `ortho_keras.experiment.run`.
        chance_steps: int. A trial that is still at chance after so many steps is stopped; 0: after a third of its steps.
        deadline: Time, in seconds since the epoch, at which a trial is stopped, to go on another day; `None`: never.
    """

    def __init__(self, space, data_dir=None, name="", runtime=None, chance_steps=0, deadline=None):
        super().__init__(name)
        self.space = space
        self.data_dir = data_dir
        self.runtime = runtime
        self.chance_steps = chance_steps
        self.deadline = deadline

    def over(self):
        """Returns whether the search is to end: its time is over, or the process that started this one is gone."""
        return bool(self.deadline and time.time() >= self.deadline) or workers.orphaned()

    def declare_hyperparameters(self, hp):
        self.space.recipe(hp)

    def build(self, hp):
        """Returns the compiled, untrained model of the hyperparameters' recipe."""
        recipe = self.space.recipe(hp)
        return compiled_model(recipe, load_data(recipe.dataset, self.data_dir, recipe.image_size, recipe.hold_out))[0]

    def fit(self, hp, model, folder, number):
        """Trains the hyperparameters' recipe by `run`, which builds the model itself; goes on where it was stopped.

        Args:
            hp: `keras_tuner.HyperParameters`.
            model: Ignored.
            folder: Path of the trial: `outcome.json`, `log.txt`, and the run itself in `run/`.
            number: int, the trial's.

        Returns:
            `{"validation_accuracy": float}`; chance, one over the number of classes, where the trial is hopeless.

        Raises:
            SearchStopped: If the search is to stop.
            keras_tuner.errors.FailedTrialError: If the run could not be done; `outcome.json` says why.
        """
        recipe, folder = self.space.recipe(hp), pathlib.Path(folder)
        before = Trial.read(folder)
        goes_on = before is not None and before.state == RUNNING
        starts = before.starts + 1 if goes_on and not _wrote_a_checkpoint(folder) else 1
        watch = _Watch(recipe.batch_size, self.chance_steps, self.over)
        started = time.perf_counter() - (before.seconds if goes_on else 0)

        def outcome(state, score=None, crossentropy=None, reason="", starts=starts):
            seconds = round(time.perf_counter() - started, 1)
            Trial(number, state, recipe, score, crossentropy, seconds, reason, starts).write(folder)
            return {"validation_accuracy": score}

        if starts > MOST_STARTS:
            reason = f"its process ended {MOST_STARTS} times without a word or a checkpoint, as where memory is used up"
            outcome(FAILED, reason=reason)
            raise keras_tuner.errors.FailedTrialError(reason)
        outcome(RUNNING)
        keras.backend.clear_session()
        try:
            with open(folder / "log.txt", "a") as log:
                result = run(
                    recipe,
                    folder / "run",
                    self.data_dir,
                    self.name,
                    self.runtime,
                    callbacks=[watch],
                    keep_checkpoints=1,
                    log=lambda line: print(line, file=log, flush=True),
                )
        except Interrupted as error:
            outcome(RUNNING, reason=str(error), starts=0)
            raise SearchStopped(str(error), error.signum) from error
        except (HopelessError, NonFiniteLossError) as error:
            return outcome(HOPELESS, watch.chance, reason=first_line(error).partition(": try")[0])
        except Exception as error:
            outcome(FAILED, reason=first_line(error))
            raise keras_tuner.errors.FailedTrialError(first_line(error)) from error
        history = json.loads((folder / "run" / "history.json").read_text())
        return outcome(FINISHED, result["validation_accuracy"], history[-1]["validation_crossentropy"])


def _wrote_a_checkpoint(folder):
    """Whether a trial wrote a checkpoint since it began, or went on, the last time."""
    began = (folder / TRIAL_FILE).stat().st_mtime_ns
    return any(path.stat().st_mtime_ns > began for path in (folder / "run" / "checkpoints").glob("*"))


class _Watch(keras.callbacks.Callback):
    """Ends a trial that learns nothing, and asks it to stop when `over()` says so."""

    def __init__(self, batch_size, chance_steps, over):
        super().__init__()
        self.batch_size = batch_size
        self.chance_steps = chance_steps
        self.over = over

    @property
    def chance(self):
        return 1 / self.model.output_shape[-1]

    def on_train_batch_end(self, batch, logs=None):
        if self.over():
            signal.raise_signal(signal.SIGTERM)  # the trainer writes a checkpoint and ends

    def on_epoch_end(self, epoch, logs=None):
        step, epochs = int(logs["step"]), self.params["epochs"]
        if epoch + 1 == epochs or step < (self.chance_steps or epochs * step / (epoch + 1) / 3):
            return
        images = self.batch_size * step / (epoch + 1)  # of the epoch, over which the accuracy is
        if logs["accuracy"] <= self.chance + 3 * math.sqrt(self.chance * (1 - self.chance) / images):
            raise HopelessError(f"training accuracy {logs['accuracy']:.3f} at step {step}, where chance is {self.chance:.3f}")
