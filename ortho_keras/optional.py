"""Packages that only pictures and logs need, which `pip install ortho-keras` alone does not bring."""

import importlib.util


def require(feature, *packages):
    """Raises an error that names what is missing and how to get it, before a feature begins with its work.

    Args:
        feature: String, what needs the packages.
        *packages: Names of packages, by which they are imported and installed.

    Raises:
        ImportError: If one of them is not installed.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f"{feature} needs {' and '.join(missing)}: pip install {' '.join(missing)}")
