"""What a run reached, and on which machine: the content of its `result.json`."""

import contextlib
import importlib.metadata
import pathlib
import platform
import statistics

from ortho_keras.method.kernels import model_kernels, orthonormality_error
from ortho_keras.trainer.runtime import cpu_cores, device_names
from ortho_keras.version import __version__

# The form of the values of a `result.json` that are shown, and what to do where a file of a finished run is damaged.
RESULT = dict.fromkeys(("validation_accuracy", "test_top5_accuracy", "test_mirrored_accuracy"), (float, type(None)))
RESULT |= {"test_accuracy": float, "seconds": float, "steps": int, "skipped_images": (int, type(None))}
# The form of what a trained model's images and classes are: `predict` reads it from here, or from a file next to an export.
DESCRIPTION = {"class_names": [str], "image_shape": [int, int, int], "recipe": {"storage": str}}
DESCRIBED = ".classes.json"  # the end of that file's name, in place of the export's suffix
EVALUATE_AGAIN = "delete its result.json, and the same command evaluates the last checkpoint again, or give another --workdir"

MOST_CLASSES = 100  # of a confusion matrix in a file: a thousand classes would be a million numbers
PACKAGES = ("tensorflow", "keras", "tensorflow-datasets", "numpy", "scikit-learn")


def result_of(name, recipe, data, model, history, test, runtime):
    """Returns the content of `result.json`, a dict; `history` has at least one epoch, `test` the metrics on the test split."""
    kernels = model_kernels(model)
    return {
        "recipe_name": name,
        "recipe": recipe.to_json(),
        "seed": recipe.seed,
        **progress(history, recipe.grow_epoch if recipe.start_depth else 0),
        **{f"test_{key}": test.get(key) for key in ("accuracy", "top5_accuracy", "mirrored_accuracy", "crossentropy")},
        "image_shape": list(data.image_shape),
        **by_class(data.class_names, test["confusion_matrix"]),
        "penalty": test["penalty"],
        "skipped_images": len(data.skipped),
        "data_sha256": data.fingerprint,
        "parameters": model.count_params(),
        "orthonormality_error": {one.path: orthonormality_error(one.variable, one.layout, one.groups) for one in kernels},
        "device": {
            "type": device_names(),
            "cpu_cores": cpu_cores(),
            "machine": platform.machine(),
            "processor": processor(),
            "runtime": runtime.describe(),
        },
        "versions": {"python": platform.python_version(), "ortho_keras": __version__, **installed_versions(*PACKAGES)},
    }


def by_class(names, matrix):
    """Returns the part of `result.json` on single classes, from a confusion matrix, whose rows are the true classes.

    A class without a test image has the accuracy `None`. Above `MOST_CLASSES` the matrix is left out.
    """
    rows = zip(names, matrix.diagonal().tolist(), matrix.sum(1).tolist())
    return {
        "class_names": list(names),
        "test_accuracy_by_class": {name: right / count if count else None for name, right, count in rows},
        "test_confusion_matrix": matrix.tolist() if len(names) <= MOST_CLASSES else None,
    }


def progress(history, first_epoch=0):
    """Returns the part of `result.json` that the epochs so far determine; the pace is the median from `first_epoch` on."""
    if not history:
        return {}
    rates = [row["images/s"] for row in history[first_epoch:] if "images/s" in row]
    validated = [row["validation_accuracy"] for row in history if "validation_accuracy" in row]
    return {
        "validation_accuracy": validated[-1] if validated else None,
        "training_accuracy": history[-1]["accuracy"],
        "penalty": history[-1]["penalty"],
        "steps": history[-1]["step"],
        "seconds": round(sum(row["seconds"] for row in history), 3),
        "images_per_second": round(statistics.median_high(rates), 1) if rates else None,
    }


def installed_versions(*distributions):
    """Returns `{distribution: version}` of those that are installed."""
    return {one.name: one.version for one in importlib.metadata.distributions() if one.name in distributions}


def hardware(device):
    """Returns the names of the GPUs in a result's `device`, or the number of cores and the processor's name."""
    if device["type"] == ["CPU"]:
        return f"{device['cpu_cores']} core(s) of {device['processor']}"
    return ", ".join(device["type"])


def processor():
    """Returns the name of the machine's processor."""
    with contextlib.suppress(OSError, StopIteration):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor()
