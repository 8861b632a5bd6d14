"""What a run refuses by one line: damaged and foreign workdirs, networks and steps that do not fit."""

import dataclasses
import errno
import json
import os
import shutil

import keras
import pytest
import tensorflow as tf
from command_lines import invoke
from small_runs import RECIPE, silent

from ortho_keras import load_model, plain_cnn, plain_imagenet
from ortho_keras.method.errors import InputError
from ortho_keras.method.files import only_one
from ortho_keras.trainer import run as experiment
from ortho_keras.trainer import runtime
from ortho_keras.trainer.run import run


def test_a_damaged_finished_run_is_named_and_evaluates_again(tmp_path, finished, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir, ignore=shutil.ignore_patterns("tensorboard"))
    result, lines = workdir / "result.json", []
    again = "delete its result.json, and the same command evaluates the last checkpoint again, or give another --workdir"
    for content in ("", "[]", "{}", result.read_text()[:200], result.read_text().replace('"steps": 40', '"steps": "40"')):
        result.write_text(content)
        with pytest.raises(InputError, match=f"{again}. Received: '{result}'"):
            run(RECIPE, workdir, log=lines.append)
    assert lines == []
    shutil.copy(finished[0] / "result.json", result)
    model = (workdir / "final.keras").read_bytes()
    (workdir / "final.keras").write_bytes(model[: len(model) // 2])
    status, _, err = invoke(
        capsys, f"--recipe_file={workdir}/run.json", f"--workdir={workdir}", f"--export={tmp_path}/net.keras"
    )
    assert status == 2 and err.count("\n") == 1 and again in err and str(workdir / "final.keras") in err
    result.unlink()
    assert run(RECIPE, workdir, log=lines.append)["test_accuracy"] == finished[1]["test_accuracy"]
    assert "resuming after step 40 of 40" in lines and not any(line.startswith("epoch ") for line in lines)
    assert load_model(workdir / "final.keras").count_params() == finished[1]["parameters"]


def test_files_and_folders_in_each_others_place_and_a_checkpoint_beyond_the_end(tmp_path, finished):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    (workdir / "result.json").unlink()
    shutil.copy(workdir / "checkpoints" / "step-000000040.npz", workdir / "checkpoints" / "step-000000041.npz")
    with pytest.raises(InputError, match="^--workdir must hold checkpoints of a run of 40 steps. Received: .* one of step 41$"):
        run(RECIPE, workdir, log=silent)
    for name, kind in (
        ("final.keras", "dangling link"),
        ("final.keras", "folder"),
        ("checkpoints/step-000000040.npz", "folder"),
        ("tensorboard", "dangling link"),
        ("tensorboard", "file"),
        ("checkpoints", "file"),
    ):
        path = workdir / name
        if path.exists():
            (shutil.rmtree if path.is_dir() else os.remove)(path)
        path.mkdir() if kind == "folder" else path.touch() if kind == "file" else path.symlink_to(tmp_path / "nowhere")
        with pytest.raises(InputError, match=f"^--workdir must hold files and folders .* Received: {path}, a {kind}$"):
            run(RECIPE, workdir, log=silent)
        path.rmdir() if kind == "folder" else path.unlink()


def test_the_bound_on_the_memory_is_below_what_networks_need():
    for network, depth, width in ((plain_cnn, 8, 64), (plain_cnn, 44, 4), (plain_imagenet, 34, 4), (plain_imagenet, 101, 4)):
        least = experiment.LAYER_WEIGHTS * depth * width**2
        parameters = network(depth, (32, 32, 3), width=width, initializer="he_normal").count_params()
        assert least <= parameters and (depth > 8 or least > 0.98 * parameters)


def test_what_ran_out_is_named(tmp_path):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for error, message in (
        (tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor"), "--batch_size=128 .*--width=4 .*OOM"),
        (
            tf.errors.ResourceExhaustedError(None, None, f"x; {full.strerror}"),
            "the disk of --workdir must have space; ",
        ),
        (full, "the disk of --workdir must have space; "),
        (RuntimeError(f"unable to close file, errno = 28, error message = '{full.strerror}'"), "the disk of --workdir must"),
    ):
        with pytest.raises(InputError, match=message), experiment._resource_errors(RECIPE, runtime.Runtime(), tmp_path):
            raise error
    with pytest.raises(FileNotFoundError), experiment._resource_errors(RECIPE, runtime.Runtime(), tmp_path):
        raise FileNotFoundError(errno.ENOENT, "no such file")


def test_a_run_in_half_precision_is_asked_for_by_its_own_flag(tmp_path):
    keras.config.set_floatx("bfloat16")
    try:
        with pytest.raises(InputError, match="^Keras's floatx must be float32; use --precision instead. Received: 'bfloat16'$"):
            run(RECIPE, tmp_path, log=silent)
    finally:
        keras.config.set_floatx("float32")
    assert not list(tmp_path.iterdir())


def test_a_workdir_of_another_run_or_process_is_refused(tmp_path):
    recipe = dataclasses.replace(RECIPE, width=2)
    own, content = tmp_path / "run.json", {"recipe": recipe.to_json(), "data_sha256": "0123456789abcdef" * 4}
    expected = r"which holds another: data_sha256='(0123456789abcdef){4}' there, '[0-9a-f]{64}' here"
    for held, message in (
        (json.dumps(content), expected),
        ("{", "hold a run with an intact run.json. .*run.json' .Expecting property name"),
        ('{"recipe": {}, "data_sha256": 3}', "run.json' .data_sha256 is 3, expected a string or null"),
        ('{"recipe": {"colour": 3}}', "hold this very run.* no such value: {'colour': 3}"),
    ):
        own.write_text(held)
        with pytest.raises(InputError, match=f"--workdir must be .*{message}"):
            run(recipe, tmp_path, log=silent)
        assert own.read_text() == held
    own.unlink()
    with only_one(tmp_path), pytest.raises(InputError, match="--workdir is in use by another process"):
        run(recipe, tmp_path, log=silent)
    assert [path.name for path in tmp_path.iterdir()] in ([], [".lock"])
