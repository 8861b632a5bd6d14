"""Checkpoints of a training run: one file each, written whole or not at all, that holds numbers and nothing else."""

import json
import os
import pathlib
import re
import zipfile

import numpy as np

_NAME = re.compile(r"step-(\d{9})\.npz")


def state_variables(model):
    """Everything that a compiled model changes while it trains: weights, averages, seeds, the optimizer, its loss scale."""
    return [*model.variables, *model.optimizer.variables]


def save_checkpoint(directory, model, step, history, keep=2):
    """Writes the state after `step` steps, and keeps the last `keep` checkpoints up to it.

    The file is a `.npz` (a zip with a checksum for each array, read without pickle). It is written under another name and
    renamed, so a kill at any moment leaves the one before it good.

    Args:
        directory: Path; made if missing.
        model: Compiled Keras model whose optimizer is built.
        step: int, steps trained.
        history: JSON-serializable list, what to give back with it.
        keep: int, at least 1.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    arrays = {f"{i:06d}:{v.path}".replace("/", "|"): np.asarray(v) for i, v in enumerate(state_variables(model))}
    path = directory / f"step-{step:09d}.npz"
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        np.savez(file, history=np.array(json.dumps(history)), **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    found = _found(directory)  # one of a later step is of a run that could not go on from it
    for old in [*found[: found.index(path)], *found[found.index(path) + keep :]]:
        old.unlink()


def restore_checkpoint(directory, model, log=print):
    """Sets the model to the newest checkpoint that is whole, and returns `(step, history)`, or `None` where there is none.

    A checkpoint that is truncated or damaged is named by `log`, and the one before it is used.
    """
    variables = state_variables(model)
    for path in _found(pathlib.Path(directory)):
        try:
            with np.load(path, allow_pickle=False) as file:
                history = json.loads(str(file["history"]))
                names = sorted(name for name in file.files if name != "history")
                arrays = [file[name] for name in names]
            if [array.shape for array in arrays] != [tuple(v.shape) for v in variables]:
                raise ValueError("it belongs to another model")
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
            log(f"checkpoint {path.name} cannot be used ({error}); trying the one before it")
            continue
        for variable, array in zip(variables, arrays):
            variable.assign(array)
        return int(_NAME.fullmatch(path.name)[1]), history
    return None


def _found(directory):
    """The checkpoints in a directory, newest first."""
    return sorted((p for p in directory.glob("*.npz") if _NAME.fullmatch(p.name)), reverse=True)
