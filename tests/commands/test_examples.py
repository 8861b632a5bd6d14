"""The scripts of examples/, smaller than they are by default, as processes of their own."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def example(name, *flags):
    return subprocess.run([sys.executable, "-m", f"examples.{name}", *flags], cwd=ROOT, capture_output=True, text=True)


def lines_of(name, *flags):
    done = example(name, *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_finetune_brings_kernels_nearer_to_orthonormal_than_its_control():
    first, without, penalized, last = lines_of("finetune", "--epochs=2", "--factor=0.5")
    assert first.startswith("4 epochs on 1437 digits first: ")
    moved = [tuple(map(float, re.search(r"from ([\d.]+) to ([\d.]+)\.$", line).groups())) for line in (without, penalized)]
    assert moved[0][0] == moved[1][0]  # both from the same weights
    assert moved[0][1] > 0.8 * moved[0][0] and moved[1][1] < moved[1][0] / 5
    right = [int(re.search(r": (\d+) are right", line)[1]) for line in (without, penalized)]
    gain = right[1] - right[0]
    images = f"{abs(gain)} images {'more' if gain > 0 else 'fewer'}" if gain else "as many images"
    assert last.startswith("With the penalty kernels end ") and last.endswith(f" orthonormal, and {images} are right.")


def test_custom_loop_keeps_the_gradients_of_all_layers_alike():
    _, plain, modulated, *runs, last = lines_of("custom_loop", "--depth=44", "--steps=3")
    ratios = [float(re.search(r", ([\d.e+]+) times as much$", line)[1]) for line in (plain, modulated)]
    assert ratios[0] > 100 and 0.1 < ratios[1] < 10
    assert len(runs) == 3 and all("; 1 trace, " in line for line in runs)  # the switch does not trace again
    losses = [float(re.search(r" ([\d.]+) over the last tenth", line)[1]) for line in runs]
    first = {re.search(r": loss ([\d.]+) at the first step", line)[1] for line in runs}
    assert len(first) == 1  # the same weights, the same batch
    assert ("not lower" in last) == (losses[0] >= min(losses[1:]))


def test_search_names_the_best_trial():
    lines = lines_of("search", "--max_trials=2", "--epochs=1")
    *trials, best = [line for line in lines if " modulation: " not in line]
    found = [re.search(r"^trial \d of 2: ([\d.]+) with (.*)$", line).groups() for line in trials]
    highest = max(accuracy for accuracy, _ in found)
    ends = [f"{highest} of the validation images are right with {told}." for accuracy, told in found if accuracy == highest]
    assert len(found) == 2 and best in [f"The best of 2 trials: {end}" for end in ends]


@pytest.mark.parametrize(
    "name, flag, told",
    [
        ("finetune", "--weights=mine", "flag --weights=mine: value should be one of <imagenet>"),
        ("custom_loop", "--depth=55", "flag --depth=55: must be 8, 14, 20, ... 6n + 2, below 1200"),
        ("search", "--max_trials=1", "flag --max_trials=1: "),
    ],
)
def test_bad_flags_are_told_in_one_line(name, flag, told):
    done = example(name, flag)
    assert done.returncode == 1 and "Traceback" not in done.stderr and not done.stdout
    assert any(line.startswith("FATAL") and told in line for line in done.stderr.splitlines()), done.stderr
