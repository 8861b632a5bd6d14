"""A finished run that several files look at."""

import re

import pytest
from small_runs import RECIPE

from ortho_keras.trainer.run import run


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "digits"
    lines = []

    def log(line):
        lines.append(line)
        for step in re.findall("^epoch .* step (\\d+) ", line):  # whose checkpoint is written first
            assert (workdir / "checkpoints" / f"step-{int(step):09d}.npz").exists()

    return workdir, run(RECIPE, workdir, name="digits", log=log), lines
