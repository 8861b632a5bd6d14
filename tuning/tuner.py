"""keras-tuner's loop over trials, each of which is the project's own run of a recipe."""

import json
import math
import os
import pathlib
import signal
import time

import keras
import keras_tuner
from keras_tuner.engine import base_tuner

from ortho_keras.method.errors import Interrupted, NonFiniteLossError, first_line
from ortho_keras.trainer.run import run
from tuning import workers
from tuning.trials import FAILED, FINISHED, HOPELESS, RUNNING, TRIAL_FILE, Trial, best_trial, read_trials

MOST_STARTS = 3


class HopelessError(Exception):
    """The trial learns nothing."""


class SearchStopped(keras_tuner.errors.FatalError):
    """The search was asked to stop, or its budget is used up; the running trial has written a checkpoint."""

    def __init__(self, message, signum=signal.SIGTERM):
        super().__init__(message)
        self.signum = signum


class Search(base_tuner.BaseTuner):
    """Asks an oracle for trials and trains each by `ortho_keras.trainer.run.run`.

    Args:
        oracle: See `make_oracle`.
        space: `SearchSpace`.
        directory: Path of the search.
        data_dir: See `run`.
        name: String, the recipe's name.
        runtime: See `run`.
        chance_steps: int. Steps after which a trial at chance is stopped; 0: a third of its steps.
        deadline: Time, in seconds since the epoch, at which a trial is stopped, for the next call to resume; `None`: never.
        log: Function that takes a line of progress.
    """

    def __init__(self, oracle, space, directory, data_dir, name, runtime, chance_steps=0, deadline=None, log=print):
        self.space = space
        self.data_dir = data_dir
        self.name = name
        self.runtime = runtime
        self.chance_steps = chance_steps
        self.deadline = deadline
        self.log = log
        path = pathlib.Path(directory).absolute()
        super().__init__(oracle, directory=path.parent, project_name=path.name)

    def over(self):
        """Returns whether the search must end: its budget is used up, or the process that started this one is gone."""
        return bool(self.deadline and time.time() >= self.deadline) or workers.orphaned()

    def _get_tuner_fname(self):
        return os.path.join(self.project_dir, "oracle.json")  # a search has no state besides its oracle's

    def save(self):
        if not self._is_worker():
            self.oracle.save()

    def reload(self):
        if not self._is_worker():
            self.oracle.reload()

    def pre_create_trial(self):
        if self.over():
            raise SearchStopped("the search ended between trials")
        if self._is_worker():
            workers.await_chief(self.log)
        time.sleep(0.1)  # an oracle that has nothing to do yet is asked again and again

    def run_trial(self, trial):
        """Trains a trial's recipe, or resumes it where it was stopped.

        Writes `outcome.json`, `log.txt` and the run itself, in `run/`, into the trial's folder.

        Returns:
            `{"validation_accuracy": float}`; chance, one over the number of classes, where the trial is hopeless.

        Raises:
            SearchStopped: If the search must stop.
            keras_tuner.errors.FailedTrialError: If the run failed; `outcome.json` has the reason.
        """
        recipe, folder = self.space.recipe(trial.hyperparameters), pathlib.Path(self.get_trial_dir(trial.trial_id))
        before = Trial.read(folder)
        resumes = before is not None and before.state == RUNNING
        starts = before.starts + 1 if resumes and not _wrote_a_checkpoint(folder) else 1
        watch = _Watch(recipe.batch_size, self.chance_steps, self.over)
        started = time.perf_counter() - (before.seconds if resumes else 0)

        def outcome(state, score=None, crossentropy=None, reason="", starts=starts):
            seconds = round(time.perf_counter() - started, 1)
            Trial(int(trial.trial_id) + 1, state, recipe, score, crossentropy, seconds, reason, starts).write(folder)
            return {"validation_accuracy": score}

        if starts > MOST_STARTS:
            reason = f"its process ended {MOST_STARTS} times without a message or a checkpoint, as if memory was used up"
            outcome(FAILED, reason=reason)
            raise keras_tuner.errors.FailedTrialError(reason)
        outcome(RUNNING)
        keras.backend.clear_session()
        try:
            with open(folder / "log.txt", "a") as file:

                def log(line):
                    print(line, file=file, flush=True)

                result = run(recipe, folder / "run", self.data_dir, self.name, self.runtime, [watch], 1, log=log)
        except Interrupted as error:
            outcome(RUNNING, reason=str(error), starts=0)
            raise SearchStopped(str(error), error.signum) from error
        except (HopelessError, NonFiniteLossError) as error:
            return outcome(HOPELESS, watch.chance, reason=first_line(error).partition(": try")[0])
        except Exception as error:
            outcome(FAILED, reason=first_line(error))
            raise keras_tuner.errors.FailedTrialError(first_line(error)) from error
        crossentropy = json.loads((folder / "run" / "history.json").read_text())[-1]["validation_crossentropy"]
        if not math.isfinite(crossentropy):
            return outcome(HOPELESS, watch.chance, reason="the validation cross-entropy is not finite")
        return outcome(FINISHED, result["validation_accuracy"], crossentropy)

    def on_trial_end(self, trial):
        super().on_trial_end(trial)
        trials = read_trials(self.project_dir)
        own = next(one for one in trials if one.number == int(trial.trial_id) + 1)
        self.log(progress(own, trials, self.oracle.max_trials, self.deadline))


def progress(own, trials, max_trials, deadline=None):
    """Returns the line about a trial that has ended: what it reached, the best so far, and the time that is left."""
    reached = f"validation accuracy {own.score:.4f}" if own.state == FINISHED else f"{own.state}: {own.reason}"
    ended = [trial for trial in trials if trial.state != RUNNING]
    parts = [f"trial {own.number} of {max_trials}: {reached}, {own.seconds:.0f} s"]
    best = best_trial(trials)
    parts += [f"best so far {best.score:.4f} (trial {best.number})"] if best else []
    seconds = (max_trials - len(ended)) * sum(trial.seconds for trial in ended) / len(ended) / workers.count()
    if deadline:
        seconds = min(seconds, deadline - time.time())
    parts += [f"{math.ceil(max(0, seconds) / 60)} min left"] if len(ended) < max_trials else []
    return "; ".join(parts)


def _wrote_a_checkpoint(folder):
    """Whether a trial wrote a checkpoint since it was last started."""
    began = (folder / TRIAL_FILE).stat().st_mtime_ns
    return any(path.stat().st_mtime_ns > began for path in (folder / "run" / "checkpoints").glob("*"))


class _Watch(keras.callbacks.Callback):
    """Ends a trial that learns nothing, and interrupts it when `over()` is true."""

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

    def steps_to_due(self, step):
        return math.inf  # a call takes a fraction of a second

    def on_epoch_end(self, epoch, logs=None):
        step, epochs = int(logs["step"]), self.params["epochs"]
        if epoch + 1 == epochs or step < (self.chance_steps or epochs * step / (epoch + 1) / 3):
            return
        images = self.batch_size * step / (epoch + 1)  # of one epoch, over which the accuracy is measured
        if logs["accuracy"] <= self.chance + 3 * math.sqrt(self.chance * (1 - self.chance) / images):
            raise HopelessError(f"training accuracy {logs['accuracy']:.3f} at step {step}, where chance is {self.chance:.3f}")
