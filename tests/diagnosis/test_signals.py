"""What a report says in words, of made-up layers and of nets with one fault each; its columns, its table, its files."""

import csv
import dataclasses
import importlib.util
import math
import pathlib
import sys

import keras
import matplotlib.image
import numpy as np
import pytest
from reports import LOGITS, batch, report_of

import ortho_keras
from ortho_keras.diagnosis import signals
from ortho_keras.diagnosis.signals import LayerSignal, SignalReport, column, read_signals

SAVED = pathlib.Path(__file__).parents[1] / "saved" / "signals.csv"  # written before columns were declarations


def layer(name, positions, magnitude):
    return LayerSignal(name, positions=positions, backward_moment=magnitude**2, forward_moment=1.0, fired=False)


def made_up(*layers):
    return SignalReport("made_up", 1.0, tuple(layers), False)


def chain(magnitudes, positions=True):
    """Layers with these errors after a first one, which does not count."""
    return made_up(layer("first", positions, 1e9), *(layer(f"c{k}", positions, m) for k, m in enumerate(magnitudes)))


def test_growth_and_table():
    report = made_up(*chain([2.0 ** (6 - k) for k in range(7)]).layers, layer("top", False, 1e6))
    assert report.growth == (pytest.approx(64.0), pytest.approx(2.0), 6)
    assert report.findings == ["the error grows by 2x per layer towards the input: 64x over 6 layers"]
    assert len(str(report).splitlines()) == 3 + 9
    lines = str(made_up(*(layer(f"c{k}", True, 1.0) for k in range(1000)))).splitlines()[3:]
    assert len(lines) == 121 and lines[0].startswith("c999 ") and lines[-1].startswith("c0 ")
    assert lines[59].startswith("c940 ") and lines[60].startswith("... 880 layers between") and lines[61].startswith("c59 ")


STEADY = 300.0 ** np.linspace(1, 0, 9) * np.array([1, 2, 1, 0.5, 1, 2, 1, 0.5, 1])
NOISE = np.exp(np.random.default_rng(0).normal(size=9) / 2)


OUTLIERS = [
    (np.r_[300 * NOISE[-1], NOISE[1:]], True),  # one layer at an end does not stand for all
    (np.r_[2.0, 2.0 ** np.arange(8, 0, -1)], True),  # nor does it hide a growth
    (STEADY, False),
]


@pytest.mark.parametrize(("magnitudes", "outlier"), OUTLIERS)
def test_an_outlier_at_an_end_gives_way_to_the_least_squares_line(magnitudes, outlier):
    line = np.exp(-8 * np.polyfit(np.arange(9), np.log(magnitudes), 1)[0])
    total = line if outlier else magnitudes[0] / magnitudes[-1]
    assert chain(magnitudes).growth == (pytest.approx(total), pytest.approx(total ** (1 / 8)), 8)


def test_growth_is_of_the_kind_that_changes_most():
    report = made_up(*(layer(f"c{k}", True, 1.0) for k in range(5)), *(layer(f"d{k}", False, 3.0**k) for k in range(6)))
    assert report.growth == (pytest.approx(3.0**-4), pytest.approx(1 / 3), 4)
    assert report.findings == ["the error falls by 0.333x per layer towards the input: 0.012x over 4 layers"]
    # Layers that no error reaches keep their places.
    assert chain([16.0, 0.0, 0.0, 2.0, 1.0]).growth == (pytest.approx(16.0), pytest.approx(2.0), 4)


def test_humps_overflows_and_patterns_are_named():
    report = chain([1.0, 50.0, 5000.0, 50.0, 1.0], positions=False)
    assert report.findings == ["the error is 5e+03 times as large at 'c2' as at 'c0'"]
    low = dataclasses.replace(layer("c", True, 1.0), image_share=0.123, kind="Conv2D")
    expected = "only 12 % of the variance at 'c' is between images, the rest is one pattern over positions, as zero padding"
    assert made_up(low).findings == [f"{expected} causes at the borders (1 layer below 20 %)"]
    broken = dataclasses.replace(layer("b", True, 1.0), forward_moment=math.inf)
    assert made_up(layer("a", True, 1.0), broken).findings == ["the activations are not finite in 1 layer, from 'b' up"]


def test_a_dead_net_and_a_broken_one():
    dead = keras.layers.Dense(4, name="dead", bias_initializer=keras.initializers.Constant(-100.0))
    model = keras.Sequential([keras.Input((4,)), dead, keras.layers.ReLU(), keras.layers.Dense(10)])
    assert report_of(model, (4,)).findings == [
        "no error reaches 1 of 2 layers: dead",
        "100 % of the channels after 'dead' are dead (1 layer above 30 %)",
    ]
    dead.kernel.assign(np.full((4, 4), np.nan))
    broken = report_of(model, (4,))
    assert str(broken).startswith(f"{model.name}: the loss is nan")
    assert math.isnan(broken.layers[0].kernel_largest) and math.isnan(broken.layers[0].operator_largest)


def test_recurrent_layers_and_embeddings_are_listed_as_not_measured():
    words = [keras.layers.Embedding(9, 3, name="words"), keras.layers.LSTM(4, name="lstm")]
    model = keras.Sequential([keras.Input((5,), dtype="int32"), *words, keras.layers.Dense(10)])
    x, y = np.random.default_rng(0).integers(9, size=(2, 8, 5))
    report = ortho_keras.signal_report(model, x, y[:, 0], LOGITS)
    first = "not measured: words, lstm. In the other layers, nothing is wrong, and there are too few layers"
    assert report.unmeasured == ("words", "lstm") and str(report).startswith(f"{model.name}: {first}")
    with pytest.raises(ValueError, match="`x` must suit the model's layers. Received: x of shape .8, 5. .*7"):
        ortho_keras.signal_report(model, np.full((8, 5), 77), y[:, 0], LOGITS)


def test_files(tmp_path):
    report = report_of(ortho_keras.plain_cnn(8, (8, 8, 1), width=2, seed=0), (8, 8, 1))
    report.to_csv(tmp_path / "report.csv")
    with open(tmp_path / "report.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{name: str(value) for name, value in dataclasses.asdict(each).items()} for each in report.layers]
    report.plot(tmp_path / "report.png")
    picture = matplotlib.image.imread(tmp_path / "report.png")
    assert picture.shape[0] > 500 and len(np.unique(picture[..., :3].reshape(-1, 3), axis=0)) > 20
    lines = str(report).splitlines()
    assert len(lines) == 3 + 8 and lines[3].startswith("classifier") and lines[-1].startswith("stem_conv")
    if importlib.util.find_spec("pandas"):
        assert list(report.to_pandas()["name"]) == [each.name for each in report.layers]


def test_a_column_is_one_declaration(tmp_path, monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class WithMean(LayerSignal):
        forward_mean: float = column(
            lambda call: float(np.mean(call.linear)),
            header="mean",
            findings=lambda report: [f"the mean at {report.layers[0].name!r} is {report.layers[0].forward_mean:.3f}"],
            scalar=True,
        )

    for module in (signals, sys.modules["ortho_keras.diagnosis.signal_report"]):
        monkeypatch.setattr(module, "LayerSignal", WithMean)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(5, name="a"), keras.layers.Dense(10, name="b")])
    model.compile("sgd", LOGITS)
    x, y = batch((6,))
    means = [np.mean(x @ model.layers[0].kernel), np.mean(model(x))]
    report = ortho_keras.signal_report(model, x, y)
    first, _, header, *table = str(report).splitlines()
    assert f"the mean at 'a' is {means[0]:.3f}" in first and header.split()[-1] == "mean"
    assert [float(line.split()[-1]) for line in table] == pytest.approx(means[::-1], rel=1e-2)
    report.to_csv(tmp_path / "report.csv")
    with open(tmp_path / "report.csv", newline="") as file:
        assert [float(row["forward_mean"]) for row in csv.DictReader(file)] == pytest.approx(means, rel=1e-4)

    # A run that an earlier version began goes on in its file.
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "signals.csv").write_bytes(SAVED.read_bytes())
    model.optimizer.iterations.assign(5)
    model.fit(x, y, verbose=0, callbacks=[ortho_keras.SignalMonitor(x, y, folder, every=1)])
    rows = read_signals(folder / "signals.csv")
    assert [row["step"] for row in rows] == [0] * 8 + [2] * 8 + [4] * 8 + [5, 5, 6, 6]
    assert all(math.isnan(row["forward_mean"]) for row in rows[:24])
    assert [row["forward_mean"] for row in rows[24:26]] == pytest.approx(means, rel=1e-4)


def test_a_file_of_another_version(tmp_path):
    rows = read_signals(SAVED)
    assert len(rows) == 24 and {row["step"] for row in rows} == {0, 2, 4} and len(rows[0]) == 19
    assert (rows[0]["name"], rows[0]["positions"], rows[0]["fired"], rows[7]["positions"]) == ("stem_conv", True, True, False)
    assert rows[0]["backward_moment"] == 7.379373945584633e-06 and math.isnan(rows[0]["kernel_smallest"])

    header, *lines = (line.split(",") for line in SAVED.read_text().splitlines())
    known = [name not in ("image_share", "fired", "kind") for name in header]
    kept = [[text for text, keep in zip(line, known) if keep] for line in (header, *lines)]
    text = "".join(",".join([*line, "new" if at else "later"]) + "\n" for at, line in enumerate(kept))
    path = tmp_path / "signals.csv"
    path.write_text(text + "6,stem_conv,Tr")  # cut off by a kill
    for old, read in zip(rows, read_signals(path), strict=True):
        assert math.isnan(read["image_share"]) and read["fired"] is None and read["kind"] == "" and read["later"] == "new"
        same = set(old) - {"image_share", "fired", "kind"}
        np.testing.assert_equal({name: read[name] for name in same}, {name: old[name] for name in same})
    path.write_text("name,mark\nA,3\n")
    with pytest.raises(ValueError, match="`path` must be a file with the columns step and name. Received: .*, with name, mark"):
        read_signals(path)
    assert read_signals(tmp_path / "none.csv") == []
