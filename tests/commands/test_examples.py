"""The scripts of examples/, smaller than they are by default."""

import re

import keras
import pytest
from absl import flags
from command_lines import script


def lines_of(monkeypatch, capsys, name, *arguments, **smaller):
    """The lines that a script prints, with other values for its constants."""
    with script(monkeypatch, f"examples/{name}.py", *arguments) as module:
        for constant, value in smaller.items():
            assert hasattr(module, constant)
            setattr(module, constant, value)
        module.main(None)
    return capsys.readouterr().out.splitlines()


def small_mobilenet(weights=None):
    """Two of MobileNet's blocks; that all of its kernels are covered: README.md's code, which a test runs."""
    model = keras.Sequential([keras.Input((32, 32, 3))])
    for _ in range(2):
        model.add(keras.layers.DepthwiseConv2D(3, strides=2, use_bias=False))
        model.add(keras.layers.Conv2D(16, 1, use_bias=False))
        model.add(keras.layers.BatchNormalization())
        model.add(keras.layers.ReLU())
    model.add(keras.layers.GlobalAveragePooling2D())
    model.add(keras.layers.Dense(10, activation="softmax"))
    return model


def test_finetune_brings_kernels_nearer_to_orthonormal_than_its_baseline(monkeypatch, capsys):
    given = ["--epochs=2", "--factor=0.5"]
    lines = lines_of(monkeypatch, capsys, "finetune", *given, FIRST_EPOCHS=1, build=small_mobilenet)
    first, without, penalized, last = lines
    assert first.startswith("1 epochs on 1437 digits first: ")
    moved = [tuple(map(float, re.search(r"from ([\d.]+) to ([\d.]+)\.$", line).groups())) for line in (without, penalized)]
    assert moved[0][0] == moved[1][0]  # both from the same weights
    assert moved[1][1] < 0.8 * moved[1][0] < moved[0][1]
    assert last.startswith("With the penalty kernels end ")


def test_custom_loop_keeps_the_gradients_of_all_layers_alike(monkeypatch, capsys):
    _, plain, modulated, *runs, last = lines_of(monkeypatch, capsys, "custom_loop", "--depth=20", "--steps=3")
    ratios = [float(re.search(r", ([\d.e+]+) times as much$", line)[1]) for line in (plain, modulated)]
    assert ratios[0] > 10 and 0.1 < ratios[1] < 5
    assert len(runs) == 3 and all("; 1 trace, " in line for line in runs)  # the switch does not trace again
    losses = [float(re.search(r" ([\d.]+) over the last tenth", line)[1]) for line in runs]
    first = {re.search(r": loss ([\d.]+) at the first step", line)[1] for line in runs}
    assert len(first) == 1  # the same weights, the same batch
    assert ("not lower" in last) == (losses[0] >= min(losses[1:]))


def test_search_prints_the_best_trial(monkeypatch, capsys):
    lines = lines_of(monkeypatch, capsys, "search", "--max_trials=2", "--epochs=1", LAYERS=8, WIDTH=4)
    *trials, best = [line for line in lines if " modulation: " not in line]
    found = [re.search(r"^trial \d of 2: ([\d.]+) with (.*)$", line).groups() for line in trials]
    highest = max(accuracy for accuracy, _ in found)
    assert len(found) == 2 and best.startswith(f"The best of 2 trials: {highest} of ")
    assert any(best.endswith(f" with {values}.") for accuracy, values in found if accuracy == highest)


@pytest.mark.parametrize(
    "name, flag, message",
    [
        ("finetune", "--weights=mine", "value should be one of <imagenet>"),
        ("custom_loop", "--depth=55", "must be 8, 14, 20, ... 6n [+] 2, below 1200"),
        ("search", "--max_trials=1", "flag --max_trials=1: "),
    ],
)
def test_bad_flags_are_refused(monkeypatch, name, flag, message):
    with pytest.raises(flags.IllegalFlagValueError, match=message), script(monkeypatch, f"examples/{name}.py", flag):
        pass
