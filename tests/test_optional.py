"""The library with nothing but its declared dependencies: it imports, and what needs more says so before it begins."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from absl.testing import flagsaver
from command_lines import ROOT
from image_files import write_photographs

import ortho_keras
from ortho_keras.method.checks import require
from ortho_keras.trainer import command, report
from ortho_keras.trainer.data import load_data
from ortho_keras.trainer.result import installed_versions

OPTIONAL = ("tensorflow_datasets", "tensorboard", "sklearn", "keras_tuner", "matplotlib", "pandas", "filelock")


def test_every_module_imports_without_them():
    root = pathlib.Path(ortho_keras.__file__).parents[1]
    paths = [path.relative_to(root).with_suffix("") for path in (root / "ortho_keras").rglob("*.py")]
    modules = sorted(".".join(path.parts) for path in paths)
    assert len(modules) > 30
    without = f"import importlib, sys\nsys.modules.update(dict.fromkeys({OPTIONAL}))\n"
    code = without + f"for name in {modules}: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, stderr=subprocess.PIPE, text=True)
    assert "oneDNN" not in done.stderr and "CPU instructions" not in done.stderr  # TensorFlow's notes


def test_require_names_what_is_missing_and_only_that():
    require("a test", "numpy", "keras")
    assert installed_versions("numpy", "no-such-distribution") == {"numpy": np.__version__}
    with pytest.raises(ImportError, match=r"^a test needs no_such_one and nor_this: pip install no_such_one nor_this$"):
        require("a test", "no_such_one", "numpy", "nor_this")


def test_configurations_that_do_not_fit_are_one_line_or_do_not_matter(tmp_path):
    """The backend in Keras's file and matplotlib's do not; Keras imports both, once in a process."""
    for name in ("float16", "bfloat16"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "keras.json").write_text(json.dumps({"backend": "jax", "floatx": name}))
    given = [sys.executable, "train.py", "--depth=8", f"--workdir={tmp_path / 'run'}"]
    for variables, expected in (
        ({"KERAS_BACKEND": "jax"}, "KERAS_BACKEND must be tensorflow, or not set. Received: 'jax'"),
        (
            {"KERAS_HOME": f"{tmp_path}/float16"},
            "train.py: Keras's floatx must be float32; use --precision instead. Received: 'f",
        ),
        ({"KERAS_HOME": f"{tmp_path}/bfloat16"}, "Keras's configuration file, ~/.keras/keras.json, must have floatx float32."),
    ):
        environment = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
        environment |= {"MPLBACKEND": "nonsense", **variables}
        done = subprocess.run(given, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith(expected) and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("dataset", "package", "installed"),
    [("digits", "sklearn", "scikit-learn"), ("cifar10", "tensorflow_datasets", "tensorflow-datasets")],
)
def test_a_data_set_names_the_package_that_it_needs(monkeypatch, tmp_path, dataset, package, installed):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"^--dataset {dataset} needs {installed}: pip install {installed}$"):
        load_data(dataset, tmp_path)


def test_a_run_says_what_it_lacks_before_it_begins(monkeypatch, tmp_path, capsys):
    given = ["--image_size=0", "--depth=8", "--width=2", "--max_steps=2", "--bn_batches=0", f"--workdir={tmp_path / 'run'}"]
    write_photographs(tmp_path / "data", {"train": 4, "test": 2}, 2)
    with flagsaver.flagsaver():
        command.parse_flags(["train.py", f"--dataset=folder:{tmp_path / 'data'}", "--batch_size=4", *given])
        with monkeypatch.context() as without:
            for package in ("matplotlib", "tensorboard"):
                without.setitem(sys.modules, package, None)
            assert command.main(["train.py"]) == 2
        expected = "train.py: a run needs matplotlib and tensorboard: pip install matplotlib tensorboard\n"
        assert capsys.readouterr().err == expected and not (tmp_path / "run").exists()


def test_features_name_the_package_that_they_need(monkeypatch, tmp_path, capsys):
    model, x, y = ortho_keras.plain_cnn(8, (8, 8, 1), width=2), np.ones((4, 8, 8, 1), "float32"), np.zeros((4, 10))
    model.compile("sgd", "mse")
    signal = ortho_keras.signal_report(model, x, y)
    for package in ("matplotlib", "tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)
    for call, message in [
        (lambda: signal.plot(tmp_path / "signal.png"), "matplotlib"),
        (lambda: ortho_keras.plot_filters(model, ["stem_conv"], tmp_path / "filters.png"), "matplotlib"),
        (lambda: ortho_keras.SignalMonitor(x, y, tmp_path / "signals"), "tensorboard matplotlib"),  # before any training
    ]:
        with pytest.raises(ImportError, match=f"pip install {message}"):
            call()
    assert report.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == "ortho_keras.trainer.report: a report needs matplotlib: pip install matplotlib\n"
    assert not list(tmp_path.iterdir())
