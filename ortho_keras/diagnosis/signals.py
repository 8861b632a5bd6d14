"""What is measured of a network's signal, layer by layer: one declaration per column, and the report made of them."""

import csv
import dataclasses
import math
import os
import statistics

from ortho_keras.diagnosis.plots import plot_signals
from ortho_keras.diagnosis.trace import magnitude, ratio
from ortho_keras.method.checks import require
from ortho_keras.method.files import whole_file

LINES = 120  # of a printed table


def column(measure, header="", cell=None, findings=None, scalar=False, default=math.nan):
    """Declares a field of `LayerSignal`, which is a column of every file and table.

    Args:
        measure: Function of a `Call` that returns the value.
        header: Heading in the printed table; a column without one is left out there.
        cell: Function of a `LayerSignal` that returns the text in the table; by default the value with three digits.
        findings: Function of a `SignalReport` that returns sentences, the problems that the column shows.
        scalar: bool. Whether `SignalMonitor` writes the column to TensorBoard.
        default: The value where a file of another version has no such column.
    """
    metadata = {"measure": measure, "header": header, "cell": cell, "findings": findings, "scalar": scalar}
    return dataclasses.field(default=default, metadata=metadata)


def _forward_findings(report):
    broken = [layer.name for layer in report.layers if not math.isfinite(layer.forward_moment)]
    return [f"the activations are not finite in {_layers(len(broken))}, from {broken[0]!r} up"] if broken else []


def _error_findings(report):
    found = []
    broken = [layer.name for layer in report.layers if not math.isfinite(layer.backward_moment)]
    if broken:
        found.append(f"the error is not finite in {_layers(len(broken))}, from {broken[-1]!r} towards the input")
    silent = [layer.name for layer in report.layers if layer.backward_moment == 0]
    if silent:
        found.append(f"no error reaches {len(silent)} of {len(report.layers)} layers: {_listed(silent)}")
    for kind in report.kinds:
        low, *_, high = sorted((layer for _, layer in kind), key=lambda layer: layer.backward_moment)
        apart, growth = ratio(high.backward_moment, low.backward_moment) ** 0.5, _growth(kind)[0]
        if apart > 1000 and apart > 10 * max(growth, 1 / growth):
            found.append(f"the error is {apart:.2g} times as large at {high.name!r} as at {low.name!r}")
    total, per_layer, steps = report.growth
    if steps and not silent and not broken and not 0.1 <= total <= 10:
        change = f"{'grows' if total > 1 else 'falls'} by {per_layer:.3g}x per layer"
        found.append(f"the error {change} towards the input: {total:.2g}x over {_layers(steps)}")
    return found


def _image_findings(report):
    low = [(layer.image_share, layer.name, layer.kind) for layer in report.layers if layer.image_share < 0.2]
    if not low:
        return []
    share, name, kind = min(low)
    between, cause = ("images", ", as zero padding causes at the borders") if "Conv" in kind else ("samples", "")
    shown = f"only {100 * share:.2g} % of the variance at {name!r} is between {between}"
    return [f"{shown}, the rest is one pattern over positions{cause} ({_layers(len(low))} below 20 %)"]


def _dead_findings(report):
    high = [(layer.dead_share, layer.name) for layer in report.layers if layer.dead_share > 0.3]
    share, name = max(high, default=(0, ""))
    return [f"{100 * share:.0f} % of the channels after {name!r} are dead ({_layers(len(high))} above 30 %)"] if high else []


def _span(kind):
    return lambda layer: f"{getattr(layer, kind + '_smallest'):.2g}-{getattr(layer, kind + '_largest'):.2g}"


def _percent(name):
    return lambda layer: f"{100 * getattr(layer, name):.0f} %"


@dataclasses.dataclass(frozen=True)
class LayerSignal:
    """One call of a parametric layer; values that do not apply are NaN.

    "Error" is the backpropagated gradient at the layer's output, before the layer's own activation; its magnitude is the
    root mean square.
    """

    name: str = column(lambda call: call.name, "layer", lambda layer: layer.name, default="")
    kind: str = column(lambda call: type(call.layer).__name__, default="")  # the layer's class
    positions: bool = column(lambda call: call.has_positions, default=None)  # whether the output has pixels or time steps
    forward_moment: float = column(  # mean of squares of the output, before the layer's own activation
        lambda call: magnitude(call.linear) ** 2, "forward", lambda layer: f"{layer.forward_moment**0.5:.3g}", _forward_findings
    )
    # Mean of squares of the error, `q` of the paper.
    backward_moment: float = column(lambda call: call.error**2, findings=_error_findings)
    # Magnitude of the error over that at the next parametric layer towards the output.
    error_to_next: float = column(lambda call: ratio(call.error, call.next_error))
    # Magnitude of the error over that at the last parametric layer.
    error_to_top: float = column(lambda call: ratio(call.error, call.top_error), "error", scalar=True)
    # Norm of the kernel's gradient over the kernel's norm.
    gradient_ratio: float = column(lambda call: call.gradient_ratio, "gradient", scalar=True)
    # Mean cosine similarity of pairs of filters, and the mean of the absolute values, which cannot cancel.
    mean_cosine: float = column(lambda call: call.cosines[0])
    mean_abs_cosine: float = column(lambda call: call.cosines[1], "|cosine|", scalar=True)
    # Smallest and largest singular value of the kernel's matrix W, and of the layer's linear map on this input size.
    kernel_smallest: float = column(lambda call: call.kernel_values[0], "W", _span("kernel"))
    kernel_largest: float = column(lambda call: call.kernel_values[1])
    operator_smallest: float = column(lambda call: call.operator_values[0], "operator", _span("operator"))
    operator_largest: float = column(lambda call: call.operator_values[1])
    # Share of the output's variance between images; the rest is one pattern over positions.
    image_share: float = column(lambda call: call.image_share, "images", _percent("image_share"), _image_findings, scalar=True)
    # Share of channels that the following activation makes constant.
    dead_share: float = column(lambda call: call.dead_share, "dead", _percent("dead_share"), _dead_findings, scalar=True)
    # Factor by which modulation multiplies the error, or would.
    scale: float = column(lambda call: call.scale, "scale", lambda layer: f"{layer.scale:.3g}" if layer.fired else "")
    fired: bool = column(lambda call: abs(call.scale - 1) > 0, default=None)  # whether modulation rescales the error, or would

    @classmethod
    def of(cls, call):
        """Returns the values of all columns for a traced `Call`."""
        return cls(**{field.name: field.metadata["measure"](call) for field in dataclasses.fields(cls)})

    def cells(self):
        """Returns the row of the printed table, `{header: text}`; NaN is left blank."""
        row = {}
        for field in dataclasses.fields(self):
            header, cell = field.metadata["header"], field.metadata["cell"]
            if header:
                text = cell(self) if cell else f"{getattr(self, field.name):.3g}"
                row[header] = "" if text in ("nan", "nan-nan", "nan %") else text
        return row


@dataclasses.dataclass(frozen=True)
class SignalReport:
    """What `signal_report` measured. `print(report)` begins with the problems found, in words."""

    model: str
    loss: float
    layers: tuple  # of LayerSignal, from input to output
    modulated: bool  # whether `scale` is what modulation did, not what it would do
    unmeasured: tuple = ()  # names of layers with weights of other kinds: recurrent ones, embeddings
    paths: tuple = ()  # for each output of the model, the indices in `layers` of the longest path to it

    @property
    def kinds(self):
        """Layers whose errors compare, lists of pairs `(place, layer)`: those of one path with positions, and the others.

        Of three or more layers the first is left out: it reads the input, whose scale is arbitrary.
        """
        kinds = []
        for path in self.paths or [range(len(self.layers))]:
            for positions in (True, False):
                kind = [self.layers[index] for index in path if self.layers[index].positions is positions]
                pairs = enumerate(kind[1:] if len(kind) > 2 else kind)
                kinds.append([(place, layer) for place, layer in pairs if 0 < layer.backward_moment < math.inf])
        return [kind for kind in kinds if len(kind) > 1]

    @property
    def growth(self):
        """The growth of the error towards the input: a tuple `(total, per layer, number of steps)` of ratios of magnitudes.

        It is the largest change along the path to an output, among the layers with positions (convolutions, as a rule) or
        among the others. The total is the ratio of both ends or, if either exceeds 10 and they differ by more than a factor of
        2, the least-squares line through all layers' logarithms.
        """
        growths = [_growth(kind) for kind in self.kinds]
        return max(growths, key=lambda growth: abs(math.log(growth[0])), default=(math.nan, math.nan, 0))

    @property
    def findings(self):
        """The problems found, the gravest first, a list of sentences; empty if there is none."""
        found = [] if math.isfinite(self.loss) else [f"the loss is {self.loss}: no other value can be trusted"]
        declared = [field.metadata["findings"] for field in dataclasses.fields(self.layers[0])]
        return found + [sentence for findings in declared if findings for sentence in findings(self)]

    def __str__(self):
        total, _, steps = self.growth
        keeps = f": the error keeps its magnitude ({total:.2g}x over {_layers(steps)})"
        healthy = keeps if steps else ", and there are too few layers to measure the error's growth"
        fired = sum(bool(layer.fired) for layer in self.layers)
        modulation = f"modulation {'rescaled' if self.modulated else 'would rescale'} {_layers(fired)}"
        if all(math.isnan(layer.scale) for layer in self.layers):
            modulation = "modulation does not apply, the model branches"
        found = "; ".join(self.findings) or "nothing is wrong" + healthy
        if self.unmeasured:  # first, as what is wrong may be there
            found = f"not measured: {_listed(self.unmeasured)}. In the other layers, {found}"
        lines = [
            f"{self.model}: {found}",
            f"{len(self.layers)} parametric layers, loss {self.loss:.4g}; {modulation}. Last layer first; error: its magnitude "
            "over the last layer's; gradient: the kernel's, over the kernel's norm; W, operator: singular values",
        ]
        rows = [self.layers[0].cells().keys(), *(layer.cells().values() for layer in reversed(self.layers))]
        widths = [max(map(len, texts)) for texts in zip(*rows)]
        for name, *row in rows:
            cells = [name.ljust(widths[0]), *map(str.rjust, row, widths[1:])]
            lines.append("  ".join(cells).rstrip())
        middle, left_out = 3 + LINES // 2, len(self.layers) - LINES
        if left_out > 0:
            lines[middle : middle + left_out] = [f"... {left_out} layers between: to_csv and to_pandas have all of them ..."]
        return "\n".join(lines)

    def to_csv(self, path):
        """Writes one line for each layer, with a header, to a file; raises `ValueError` if it cannot be written."""
        rows = [dataclasses.asdict(layer) for layer in self.layers]
        with whole_file(path) as part:
            append_rows(part, rows, list(rows[0]))

    def to_pandas(self):
        """Returns a `pandas.DataFrame` with one row for each layer; raises `ImportError` if pandas is not installed."""
        require("to_pandas", "pandas")
        import pandas

        return pandas.DataFrame([dataclasses.asdict(layer) for layer in self.layers])

    def plot(self, path):
        """Plots the columns over the layers, as a PNG file; raises `ImportError` if matplotlib is not installed."""
        plot_signals(self, path)


def append_rows(path, rows, columns):
    """Appends dicts to a CSV file, after a header where the file is empty."""
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if not file.tell():
            writer.writeheader()
        writer.writerows(rows)


def read_signals(path):
    """Reads the `signals.csv` of a `SignalMonitor` of any version into a list of dicts, one for each line; none without a file.

    `step` is an int, the other values are of their column's type. A column that the file lacks reads as NaN (a bool as
    `None`), and one that is unknown here is kept as text. A last line that was cut off by a kill is dropped.
    """
    if not os.path.exists(path):
        return []
    with open(path, newline="") as file:
        reader = csv.DictReader(line for line in file if line.endswith("\n"))
        header, lines = reader.fieldnames, list(reader)
    if header and not {"step", "name"} <= set(header):
        raise ValueError(f"`path` must be a file with the columns step and name. Received: {path}, with {', '.join(header)}")
    parse = {bool: {"True": True, "False": False}.get, float: float, str: str}
    types = {"step": int, **{field.name: parse[field.type] for field in dataclasses.fields(LayerSignal)}}
    empty = {"step": 0, **dataclasses.asdict(LayerSignal())}
    try:
        return [empty | {name: types.get(name, str)(text) for name, text in line.items()} for line in lines]
    except (ValueError, TypeError) as error:
        raise ValueError(f"`path` must be a file that SignalMonitor wrote. Received: {str(path)!r} ({error})") from error


def _growth(kind):
    """`SignalReport.growth` of one of `SignalReport.kinds`."""
    places, layers = zip(*kind)
    logarithms = [0.5 * math.log(layer.backward_moment) for layer in layers]
    steps, ends = places[-1] - places[0], logarithms[0] - logarithms[-1]
    line = -steps * statistics.linear_regression(places, logarithms).slope
    ends_agree = max(abs(ends), abs(line)) <= math.log(10) or 0.5 <= ratio(line, ends) <= 2
    total = ends if ends_agree else line
    return math.exp(total), math.exp(total / steps), steps


def _layers(number):
    return "1 layer" if number == 1 else f"{number} layers"


def _listed(names, shown=3):
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
