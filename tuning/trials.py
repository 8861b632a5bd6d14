"""The outcome of each trial, in a file of its own, which is written when the trial starts and when it ends.

keras-tuner's trial.json cannot replace it: gRPC carries no message to the chief, which writes that file, so that a worker's
reason of a failure is lost; and a worker that is killed leaves no trace of its start there.
"""

import dataclasses
import pathlib

from ortho_keras.method.errors import InputError
from ortho_keras.method.files import read_json, write_json
from ortho_keras.trainer.recipe import Recipe

RUNNING, FINISHED, HOPELESS, FAILED = "running", "finished", "hopeless", "failed"
SEARCH_FILE, TRIAL_FILE = "search.json", "outcome.json"
_NUMBER_OR_NONE = (float, type(None))
SEARCH = {"recipe_name": str, "base": dict, "parameters": {str: str}, "train_flags": (list, type(None))}
TRIAL = {"number": int, "state": str, "recipe": dict, "score": _NUMBER_OR_NONE, "crossentropy": _NUMBER_OR_NONE}
TRIAL |= {"seconds": float, "reason": str, "starts": int}


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
        path, expected = pathlib.Path(folder) / TRIAL_FILE, f"each {TRIAL_FILE} of a search must be whole"
        if not path.exists():
            return None
        content = read_json(path, TRIAL, expected)
        try:
            trial = cls(**{**content, "recipe": Recipe.from_json(content["recipe"]).check()})
        except (ValueError, TypeError) as error:
            raise InputError(f"{expected}. Received: {str(path)!r} ({error})") from error
        scored = {FINISHED: (trial.score, trial.crossentropy), HOPELESS: (trial.score,), FAILED: (), RUNNING: ()}
        if None in scored.get(trial.state, [None]):
            raise InputError(f"{expected}. Received: {str(path)!r} (state is {trial.state!r}, score is {trial.score})")
        return trial


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
    path, expected = pathlib.Path(directory) / SEARCH_FILE, "the directory must hold a search"
    content = read_json(path, SEARCH, expected)
    try:
        Recipe.from_json(content["base"]).check()
    except ValueError as error:
        raise InputError(f"{expected}. Received: {str(path)!r} ({error})") from error
    return content
