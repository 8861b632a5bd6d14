"""Checkpoints of a training run: one file each, written whole or not at all, that contains only arrays and one JSON text."""

import json
import os
import pathlib
import re
import zipfile

import numpy as np

from ortho_keras.method.files import parse_json, remove_temporary, whole_file

_NAME = re.compile(r"step-(\d{9})\.npz")


def state_variables(model):
    """Everything that a compiled model changes while it trains: weights, averages, seeds, the optimizer, its loss scale."""
    return [*model.variables, *model.optimizer.variables]


def save_checkpoint(directory, model, step, history, keep=2):
    """Writes the state after `step` steps, and deletes all but the last `keep` checkpoints up to it.

    The file is a `.npz` (a zip with a checksum for each array, read without pickle). It is written under another name, then
    renamed, so that a kill at any moment leaves the previous one intact. `history` is JSON-serializable.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    arrays = {f"{i:06d}:{v.path}".replace("/", "|"): np.asarray(v) for i, v in enumerate(state_variables(model))}
    path = directory / f"step-{step:09d}.npz"
    with whole_file(path) as own, open(own, "wb") as file:
        np.savez(file, history=np.array(json.dumps(history)), **arrays)
        file.flush()
        os.fsync(file.fileno())
    remove_temporary(directory)
    found = _found(directory)
    at = found.index(path)
    for old in [*found[:at], *found[at + keep :]]:  # later steps are of a run that could not resume from them
        old.unlink()


def restore_checkpoint(directory, model, log=print, form=list):
    """Sets the model to the newest intact checkpoint and returns `(step, history)`, or `None` where there is none.

    A truncated or damaged checkpoint, or one whose history is not of the form (see `parse_json`), is logged, and the previous
    one is used.
    """
    variables = state_variables(model)
    for path in _found(pathlib.Path(directory)):
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = [file[name] for name in sorted(file.files) if name != "history"]
                history = parse_json(str(file["history"]), form)
            if [array.shape for array in arrays] != [tuple(v.shape) for v in variables]:
                raise ValueError("it belongs to another model")
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
            log(f"checkpoint {path.name} cannot be used ({error}); trying the previous one")
            continue
        for variable, array in zip(variables, arrays):
            variable.assign(array)
        return int(_NAME.fullmatch(path.name)[1]), history
    return None


def _found(directory):
    """The checkpoints in a directory, newest first."""
    return sorted((path for path in directory.glob("*.npz") if _NAME.fullmatch(path.name)), reverse=True)
