"""The library with nothing but its declared dependencies: it imports, and what needs more says so before it begins."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

import ortho_keras
from ortho_keras import report
from ortho_keras.optional import require

OPTIONAL = ("tensorflow_datasets", "importlib_resources", "tensorboard", "sklearn", "keras_tuner", "matplotlib", "pandas")


def test_every_module_imports_without_them():
    modules = sorted(path.stem for path in pathlib.Path(ortho_keras.__file__).parent.glob("*.py"))
    code = (
        f"import importlib, sys\nsys.modules.update(dict.fromkeys({OPTIONAL}))\n"
        f"for name in {modules}: importlib.import_module('ortho_keras.' + name)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=pathlib.Path(ortho_keras.__file__).parents[1], stderr=-1)
    assert done.returncode == 0, done.stderr.decode()


def test_require_names_what_is_missing_and_only_that():
    require("a test", "numpy", "keras")
    with pytest.raises(ImportError, match=r"^a test needs no_such_one and nor_this: pip install no_such_one nor_this$"):
        require("a test", "no_such_one", "numpy", "nor_this")


def test_features_name_the_package_that_they_need(monkeypatch, tmp_path, capsys):
    model, x, y = ortho_keras.plain_cnn(8, (8, 8, 1), width=2), np.ones((4, 8, 8, 1), "float32"), np.zeros(4, int)
    model.compile("sgd", "mse")
    signal = ortho_keras.signal_report(model, x, np.zeros((4, 10)))
    for package in ("matplotlib", "tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        signal.plot(tmp_path / "signal.png")
    with pytest.raises(ImportError, match="pip install matplotlib"):
        ortho_keras.plot_features(model, x, ["stem_conv"], tmp_path / "features.png")
    with pytest.raises(ImportError, match="pip install matplotlib"):
        ortho_keras.plot_filters(model, ["stem_conv"], tmp_path / "filters.png")
    # Before any training is lost.
    with pytest.raises(ImportError, match="SignalMonitor needs tensorboard and matplotlib: pip install tensorboard matplotlib"):
        ortho_keras.SignalMonitor(x, y, tmp_path / "signals")
    assert report.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == "ortho_keras.report: a report needs matplotlib: pip install matplotlib\n"
    assert not list(tmp_path.iterdir())
