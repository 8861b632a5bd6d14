"""What a run came to, and where: the content of its `result.json`."""

import contextlib
import importlib.metadata
import pathlib
import platform

from ortho_keras.method.kernels import model_kernels, orthonormality_error
from ortho_keras.trainer.runtime import cpu_cores, device_names
from ortho_keras.version import __version__

PACKAGES = ("tensorflow", "keras", "tensorflow-datasets", "numpy", "scikit-learn")


def result_of(name, recipe, data, model, history, test, runtime):
    """Returns the content of `result.json`, a dict.

    Args:
        name: The recipe's name.
        recipe: `Recipe`.
        data: `ImageData`, which was trained and judged on.
        model: The trained model.
        history: List of the epochs' figures, at least one.
        test: Dict of the figures on the test split.
        runtime: `Runtime`.
    """
    seconds = sum(row["seconds"] for row in history)
    grown = history[recipe.grow_epoch if recipe.start_depth else 0 :]
    rates = [row["images/s"] for row in grown if "images/s" in row]
    last = history[-1]
    return {
        "recipe_name": name,
        "recipe": recipe.to_json(),
        "seed": recipe.seed,
        "validation_accuracy": last.get("validation_accuracy"),
        "test_accuracy": test["accuracy"],
        "test_top5_accuracy": test.get("top5_accuracy"),
        "test_mirrored_accuracy": test.get("mirrored_accuracy"),
        "test_crossentropy": test["crossentropy"],
        "training_accuracy": last["accuracy"],
        "penalty": test["penalty"],
        "skipped_images": len(data.skipped),
        "data_sha256": data.fingerprint,
        "steps": last["step"],
        "seconds": round(seconds, 3),
        "images_per_second": round(sorted(rates)[len(rates) // 2], 1) if rates else None,
        "parameters": model.count_params(),
        "orthonormality_error": {
            kernel.path: orthonormality_error(kernel.variable, kernel.layout, kernel.groups) for kernel in model_kernels(model)
        },
        "device": {
            "type": device_names(),
            "cpu_cores": cpu_cores(),
            "machine": platform.machine(),
            "processor": processor(),
            "runtime": runtime.describe(),
        },
        "versions": {"python": platform.python_version(), "ortho_keras": __version__, **installed_versions(*PACKAGES)},
    }


def installed_versions(*distributions):
    """Returns `{distribution: version}` of those that are installed."""
    found = {}
    for distribution in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[distribution] = importlib.metadata.version(distribution)
    return found


def hardware(device):
    """Says what a run computed on by its result's `device`: the GPUs' names, or how many cores of which processor."""
    if device["type"] == ["CPU"]:
        return f"{device['cpu_cores']} core(s) of {device['processor']}"
    return ", ".join(device["type"])


def processor():
    """The name of the machine's processor."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
