"""The scripts of examples/, smaller than they are by default."""

import re

import keras
import numpy as np
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
    first, *runs, without, penalized = lines
    start = float(re.search(r" is ([\d.]+) \(median\)", first)[1])
    found = [re.search(r"^seed (\d), (\w+) .* accuracy ([\d.]+) %, .* ([\d.]+)$", line).groups() for line in runs]
    assert [(seed, name) for seed, name, *_ in found] == [(s, n) for s in "012" for n in ("without", "with")]
    for line, name in ((without, "without"), (penalized, "with")):
        accuracies, errors = np.array([(a, e) for _, n, a, e in found if n == name], float).T
        mean, deviation, error = map(float, re.search(r"([\d.]+) \+- ([\d.]+) % over 3 seeds, .* ([\d.]+)$", line).groups())
        assert line.startswith(f"{name.capitalize()} the penalty")
        assert (mean, deviation) == pytest.approx((np.mean(accuracies), np.std(accuracies, ddof=1)), abs=0.15)
        assert error == pytest.approx(np.mean(errors), abs=0.002)
        assert all(errors < 0.8 * start) if name == "with" else all(errors > 0.9 * start)


def test_custom_loop_keeps_the_gradients_of_all_layers_alike(monkeypatch, capsys):
    _, plain, modulated, *runs, last = lines_of(monkeypatch, capsys, "custom_loop", "--depth=20", "--steps=3")
    ratios = [float(re.search(r", ([\d.e+]+) times as much$", line)[1]) for line in (plain, modulated)]
    assert ratios[0] > 10 and 0.1 < ratios[1] < 5
    assert len(runs) == 3 and all("; 1 trace, " in line for line in runs)  # the switch does not trace again
    losses = [float(re.search(r" ([\d.]+) over the last tenth", line)[1]) for line in runs]
    first = {re.search(r": loss ([\d.]+) at the first step", line)[1] for line in runs}
    assert len(first) == 1  # the same weights, the same batch
    assert ("not lower" in last) == (losses[0] >= min(losses[1:]))


def test_search_prints_the_best_trial_and_tries_both_rules_again(monkeypatch, capsys):
    lines = lines_of(monkeypatch, capsys, "search", "--max_trials=2", "--epochs=1", LAYERS=8, WIDTH=4, SEEDS=(1, 2))
    first, second, best, *again = lines
    found = [re.search(r"^trial \d of 2: ([\d.]+) with (.*)$", line).groups() for line in (first, second)]
    highest = max(accuracy for accuracy, _ in found)
    assert best.startswith(f"Best of 2 trials: validation accuracy {highest} with ")
    assert any(best.endswith(f" with {values}.") for accuracy, values in found if accuracy == highest)
    assert len(again) == 2
    for line, rule in zip(again, ("off", "anchor")):
        own = [(accuracy, values) for accuracy, values in found if f"modulation={rule}" in values]
        if not own:
            assert line == f"Modulation {rule}: no trial."
            continue
        assert re.match(rf"Modulation {rule}, its best trial with 2 other seeds: [\d.]+ \+- [\d.]+ with ", line)
        assert line.endswith(max(own)[1])


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
