"""The packages import downward only, and files saved before there were packages load."""

import ast
import pathlib

import numpy as np
import pytest

import ortho_keras

pytestmark = pytest.mark.every_backend

PACKAGE = pathlib.Path(ortho_keras.__file__).parent
ORDER = ("method", "nets", "diagnosis", "trainer")  # each imports itself and those before it
SAVED = pathlib.Path(__file__).parent / "saved"


def imported(path):
    """The modules that a file imports anywhere in it, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_run_downward_only():
    seen = set()
    for number, package in enumerate(ORDER):
        for path in sorted((PACKAGE / package).rglob("*.py")):
            packages = {name.split(".")[1] for name in imported(path) if name.startswith("ortho_keras.")}
            assert packages <= {*ORDER[: number + 1], "version"}, f"{path.relative_to(PACKAGE)} imports {sorted(packages)}"
            assert not {name.split(".")[0] for name in imported(path)} & {"train", "tuning", "benchmarks", "tests"}
            seen |= {(package, other) for other in packages}
    assert {("nets", "method"), ("diagnosis", "method"), ("trainer", "diagnosis"), ("trainer", "nets")} <= seen
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "version.py"}


def test_a_model_saved_before_the_packages_loads():
    """The file was written when all modules lay flat in the package: layers are found by their registered names.

    The initializer of its first convolution, which is gone, was replaced by zeros in the file's configuration.
    """
    model = ortho_keras.load_model(SAVED / "every_class.keras", compile=False)  # Muon is not on all backends
    kept = np.load(SAVED / "every_class.npz")
    np.testing.assert_allclose(model.predict(kept["images"], verbose=0), kept["outputs"], rtol=1e-4, atol=1e-5)
    losses = np.array([float(loss) for loss in model.losses])
    corrected = np.arange(12) == 10  # SRIP's estimate of the spectral norm is larger since a correction
    np.testing.assert_allclose(losses[~corrected], kept["losses"][~corrected], rtol=1e-4)
    np.testing.assert_allclose(losses[corrected], kept["losses"][corrected], rtol=0.01)
    assert losses.shape == kept["losses"].shape == (12,)
