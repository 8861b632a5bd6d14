"""The outcome of each trial, in a file of its own, which is written when the trial starts and when it ends.

keras-tuner's trial.json cannot replace it: gRPC carries no message to the chief, which writes that file, so that a worker's
reason of a failure is lost; and a worker that is killed leaves no trace of its start there.
"""

import dataclasses
import json
import pathlib

from ortho_keras.method.errors import InputError
from ortho_keras.method.files import write_json
from ortho_keras.trainer.recipe import Recipe

RUNNING, FINISHED, HOPELESS, FAILED = "running", "finished", "hopeless", "failed"
SEARCH_FILE, TRIAL_FILE = "search.json", "outcome.json"


@dataclasses.dataclass(frozen=True)
class Trial:
    """One point of the search space and its outcome.

    Attributes:
        number: int, from 1.
        state: `"running"` (or interrupted), `"finished"`, `"hopeless"` (stopped early) or `"failed"`.
        recipe: `Recipe` that it trains.
        score: Validation accuracy; chance where the trial is hopeless; `None` where there is none.
        crossentropy: On the validation images, which decides between trials of equal accuracy; `None` where there is none.
        seconds: float, the time it took.
        reason: Why it was stopped or failed.
        starts: int, number of starts since its last checkpoint or orderly end.
    """

    number: int
    state: str
    recipe: Recipe
    score: float | None = None
    crossentropy: float | None = None
    seconds: float = 0.0
    reason: str = ""
    starts: int = 1

    def write(self, folder):
        write_json(pathlib.Path(folder) / TRIAL_FILE, dataclasses.asdict(self))

    @classmethod
    def read(cls, folder):
        """Returns the trial of a folder, or `None` where none is written yet."""
        try:
            content = json.loads((pathlib.Path(folder) / TRIAL_FILE).read_text())
            return cls(**{**content, "recipe": Recipe.from_json(content["recipe"])})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder}/{TRIAL_FILE} must be a trial's file. Received: a damaged one ({error})") from error


def read_trials(directory):
    """Returns a search's trials in the order of their numbers."""
    found = [Trial.read(folder) for folder in pathlib.Path(directory).glob("trial_*")]
    return sorted((trial for trial in found if trial), key=lambda trial: trial.number)


def best_trial(trials):
    """Returns the best finished trial of those that trained longest, by score, then by cross-entropy; or `None`."""
    finished = [trial for trial in trials if trial.state == FINISHED]
    return max(finished, key=lambda trial: (trial.recipe.epochs, trial.score, -trial.crossentropy), default=None)


def read_search(directory):
    """Returns the content of a search's `search.json`, or raises `InputError` where the directory holds no search."""
    try:
        content = json.loads((pathlib.Path(directory) / SEARCH_FILE).read_text())
        Recipe.from_json(content["base"]), dict(content["parameters"]), str(content["recipe_name"])
        return content
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"the directory must hold a search ({SEARCH_FILE}). Received: {str(directory)!r}") from error
