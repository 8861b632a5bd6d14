"""Packages that only pictures, logs and data sets need, which `pip install ortho-keras` alone does not bring."""

import contextlib
import importlib.metadata
import importlib.util

INSTALLED_AS = {"sklearn": "scikit-learn", "tensorflow_datasets": "tensorflow-datasets"}


def require(feature, *packages):
    """Raises an error that names what is missing and how to get it, before a feature begins with its work.

    Args:
        feature: String, what needs the packages.
        *packages: Names of packages, by which they are imported.

    Raises:
        ImportError: If one of them is not installed.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    missing = [INSTALLED_AS.get(package, package) for package in missing]
    if missing:
        raise ImportError(f"{feature} needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def installed_versions(*distributions):
    """Returns `{distribution: version}` of those that are installed."""
    found = {}
    for distribution in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[distribution] = importlib.metadata.version(distribution)
    return found
