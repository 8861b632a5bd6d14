"""What is measured of a network's signal, layer by layer: one declaration per column, and the report made of them."""

import csv
import dataclasses
import math
import os
import statistics

from ortho_keras.diagnosis.plots import plot_signals
from ortho_keras.diagnosis.trace import ratio
from ortho_keras.method.checks import require
from ortho_keras.method.files import whole_file

LINES = 120  # of a printed table


def column(measure, header="", cell=None, findings=None, scalar=False, default=math.nan):
    """Declares a field of `LayerSignal`: a column of the CSV files and the DataFrame and, with a header, of the table.

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
    return [f"the activations are not finite in {_count(broken, 'layer')}, from {broken[0]!r} up"] if broken else []


def _error_findings(report):
    found = []
    broken = [layer.name for layer in report.layers if not math.isfinite(layer.backward_moment)]
    if broken:
        found.append(f"the error is not finite in {_count(broken, 'layer')}, from {broken[-1]!r} towards the input")
    silent = [layer.name for layer in report.layers if layer.backward_moment == 0]
    if silent:
        found.append(f"no error reaches {len(silent)} of {len(report.layers)} layers: {_listed(silent)}")
    for kind in _kinds(report.layers):
        low, *_, high = sorted((layer for _, layer in kind), key=lambda layer: layer.backward_moment)
        apart = ratio(high.backward_moment, low.backward_moment) ** 0.5
        if apart > 1000 and apart > 10 * max(_growth(kind)[0], 1 / _growth(kind)[0]):
            found.append(f"the error is {apart:.2g} times as large at {high.name!r} as at {low.name!r}")
    total, per_layer, steps = report.growth
    if steps and not silent and not broken and not 0.1 <= total <= 10:
        change = f"{'grows' if total > 1 else 'falls'} by {per_layer:.3g}x per layer"
        found.append(f"the error {change} towards the input: {total:.2g}x over {_count(steps, 'layer')}")
    return found


def _image_findings(report):
    low = [(layer.image_share, layer.name, layer.kind) for layer in report.layers if layer.image_share < 0.2]
    if not low:
        return []
    share, name, kind = min(low)
    between, cause = ("images", ", as zero padding causes at the borders") if "Conv" in kind else ("samples", "")
    return [
        f"only {100 * share:.2g} % of the variance at {name!r} is between {between}, the rest is one pattern over "
        f"positions{cause} ({_count(low, 'layer')} below 20 %)"
    ]


def _dead_findings(report):
    high = [(layer.dead_share, layer.name) for layer in report.layers if layer.dead_share > 0.3]
    if not high:
        return []
    share, name = max(high)
    return [f"{100 * share:.0f} % of the channels after {name!r} are dead ({_count(high, 'layer')} above 30 %)"]


@dataclasses.dataclass(frozen=True)
class LayerSignal:
    """One call of a parametric layer; values that do not apply are NaN.

    "Error" is the backpropagated gradient at the layer's output, before the layer's own activation; its magnitude is the
    root mean square. Adding a field, with `column`, adds it to every table, file and log.
    """

    name: str = column(lambda call: call.name, "layer", lambda layer: layer.name, default="")
    kind: str = column(lambda call: type(call.layer).__name__, default="")  # the layer's class
    positions: bool = column(lambda call: call.has_positions, default=None)  # whether the output has pixels or time steps
    forward_moment: float = column(  # mean of squares of the output, before the layer's own activation
        lambda call: call.forward_moment, "forward", lambda layer: f"{layer.forward_moment**0.5:.3g}", _forward_findings
    )
    backward_moment: float = column(  # mean of squares of the error, `q` of the paper
        lambda call: call.error**2, findings=_error_findings
    )
    error_to_next: float = column(  # magnitude of the error over that at the next parametric layer towards the output
        lambda call: ratio(call.error, call.next_error)
    )
    error_to_top: float = column(  # magnitude of the error over that at the last parametric layer
        lambda call: ratio(call.error, call.top_error), "error", scalar=True
    )
    gradient_ratio: float = column(  # norm of the kernel's gradient over the kernel's norm
        lambda call: call.gradient_ratio, "gradient", scalar=True
    )
    mean_cosine: float = column(lambda call: call.cosines[0])  # mean cosine similarity of pairs of filters
    mean_abs_cosine: float = column(  # the mean of the absolute values, which cannot cancel
        lambda call: call.cosines[1], "|cosine|", scalar=True
    )
    kernel_smallest: float = column(  # smallest singular value of the kernel's matrix W
        lambda call: call.kernel_values[0], "W", lambda layer: f"{layer.kernel_smallest:.2g}-{layer.kernel_largest:.2g}"
    )
    kernel_largest: float = column(lambda call: call.kernel_values[1])
    operator_smallest: float = column(  # smallest singular value of the layer's linear map on this input size
        lambda call: call.operator_values[0],
        "operator",
        lambda layer: f"{layer.operator_smallest:.2g}-{layer.operator_largest:.2g}",
    )
    operator_largest: float = column(lambda call: call.operator_values[1])
    image_share: float = column(  # share of the output's variance between images; the rest is one pattern over positions
        lambda call: call.image_share, "images", lambda layer: f"{100 * layer.image_share:.0f} %", _image_findings, scalar=True
    )
    dead_share: float = column(  # share of channels that the following activation makes constant
        lambda call: call.dead_share, "dead", lambda layer: f"{100 * layer.dead_share:.0f} %", _dead_findings, scalar=True
    )
    scale: float = column(  # factor by which modulation multiplies the error, or would
        lambda call: call.scale, "scale", lambda layer: f"{layer.scale:.3g}" if layer.fired else ""
    )
    fired: bool = column(lambda call: call.fired, default=None)  # whether modulation rescales the error, or would

    @classmethod
    def of(cls, call):
        """Returns the values of all columns for a traced `Call`."""
        return cls(**{field.name: field.metadata["measure"](call) for field in dataclasses.fields(cls)})

    def cells(self):
        """Returns the row of the printed table, `{header: text}`; NaN is left blank."""
        row = {}
        for field in dataclasses.fields(self):
            if field.metadata["header"]:
                cell = field.metadata["cell"]
                text = cell(self) if cell else f"{getattr(self, field.name):.3g}"
                row[field.metadata["header"]] = "" if text in ("nan", "nan-nan", "nan %") else text
        return row


@dataclasses.dataclass(frozen=True)
class SignalReport:
    """What `signal_report` measured. `print(report)` begins with the problems found, in words."""

    model: str
    loss: float
    layers: tuple  # of LayerSignal, from input to output
    modulated: bool  # whether `scale` is what modulation did, not what it would do
    unmeasured: tuple = ()  # names of layers with weights of other kinds: recurrent ones, embeddings

    @property
    def growth(self):
        """The growth of the error towards the input: a tuple `(total, per layer, number of steps)` of ratios of magnitudes.

        It is computed among the convolutions (whose output has positions) and among the other layers, never across the two,
        since pooling changes the error by arithmetic alone; the larger change is returned. Of three or more layers the first
        is left out: it reads the input, whose scale is arbitrary. The total is the ratio of the magnitudes at both ends,
        unless the least-squares line through the logarithms of all layers has more than twice or less than half of that slope
        and either exceeds a factor of 10; then a single layer at an end is an outlier, and the line counts. NaN where there
        are too few layers.
        """
        growths = [_growth(kind) for kind in _kinds(self.layers)]
        return max(growths, key=lambda growth: abs(math.log(growth[0])), default=(math.nan, math.nan, 0))

    @property
    def findings(self):
        """The problems found, the gravest first, a list of sentences; empty if there is none."""
        found = [] if math.isfinite(self.loss) else [f"the loss is {self.loss}: no other value can be trusted"]
        for field in dataclasses.fields(self.layers[0]):
            if field.metadata["findings"]:
                found += field.metadata["findings"](self)
        return found

    def __str__(self):
        total, _, steps = self.growth
        healthy = "nothing is wrong, and there are too few layers to measure the error's growth"
        if steps:
            healthy = f"nothing is wrong: the error keeps its magnitude ({total:.2g}x over {_count(steps, 'layer')})"
        fired = sum(bool(layer.fired) for layer in self.layers)
        modulation = f"modulation {'rescaled' if self.modulated else 'would rescale'} {_count(fired, 'layer')}"
        if all(math.isnan(layer.scale) for layer in self.layers):
            modulation = "modulation does not apply, the model branches"
        unmeasured = f" (not measured: {_listed(self.unmeasured)})" if self.unmeasured else ""
        lines = [
            f"{self.model}: {'; '.join(self.findings) or healthy}{unmeasured}",
            f"{len(self.layers)} parametric layers, loss {self.loss:.4g}; {modulation}. Last layer first; error: its magnitude "
            "over the last layer's; gradient: the kernel's, over the kernel's norm; W, operator: singular values",
        ]
        rows = [layer.cells() for layer in reversed(self.layers)]
        names, *headers = rows[0]
        widths = {header: max(len(text) for text in (header, *(row[header] for row in rows))) for header in rows[0]}
        for row in ({header: header for header in rows[0]}, *rows):
            cells = [row[names].ljust(widths[names]), *(row[header].rjust(widths[header]) for header in headers)]
            lines.append("  ".join(cells).rstrip())
        left_out = len(rows) - LINES
        if left_out > 0:
            middle = 3 + LINES // 2
            lines[middle : middle + left_out] = [f"... {left_out} layers between: to_csv and to_pandas have all of them ..."]
        return "\n".join(lines)

    def to_csv(self, path):
        """Writes one line for each layer, with a header.

        Args:
            path: Path of the file, in a folder that exists.

        Raises:
            ValueError: If the file cannot be written.
        """
        rows = [dataclasses.asdict(layer) for layer in self.layers]
        with whole_file(path) as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    def to_pandas(self):
        """Returns a `pandas.DataFrame` with one row for each layer.

        Raises:
            ImportError: If pandas is not installed.
        """
        require("to_pandas", "pandas")
        import pandas

        return pandas.DataFrame([dataclasses.asdict(layer) for layer in self.layers])

    def plot(self, path):
        """Plots the columns over the layers, as a PNG file.

        Args:
            path: Path of the file, in a folder that exists.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If the file cannot be written.
        """
        plot_signals(self, path)


def read_signals(path):
    """Reads the `signals.csv` of a `SignalMonitor` of this or another version into a list of dicts, one for each line.

    `step` is an int, the other values are of their column's type. A column that the file lacks reads as NaN (a bool as
    `None`), and one that is unknown here is kept as text. A last line that was cut off by a kill is dropped.

    Args:
        path: Path of the file; where there is none the list is empty.

    Raises:
        ValueError: If the file has no columns `step` and `name`, or a value is not of its column's type.
    """
    if not os.path.exists(path):
        return []
    with open(path, newline="") as file:
        reader = csv.DictReader(line for line in file if line.endswith("\n"))
        lines = list(reader)
    header = reader.fieldnames
    if header and not {"step", "name"} <= set(header):
        raise ValueError(f"`path` must be a file with the columns step and name. Received: {path}, with {', '.join(header)}")
    parse = {bool: {"True": True, "False": False}.get, float: float, str: str}
    types = {field.name: parse[field.type] for field in dataclasses.fields(LayerSignal)}
    missing = dataclasses.asdict(LayerSignal())
    rows = []
    for line in lines:
        values = {name: types[name](text) if name in types else text for name, text in line.items()}
        rows.append({"step": int(values.pop("step")), **missing, **values})
    return rows


def _kinds(layers):
    """Layers whose errors compare, as pairs `(place, layer)`: those with positions, and the others."""
    kinds = [[layer for layer in layers if layer.positions is positions] for positions in (True, False)]
    kinds = [kind[1:] if len(kind) > 2 else kind for kind in kinds]
    kinds = [[(place, layer) for place, layer in enumerate(kind) if 0 < layer.backward_moment < math.inf] for kind in kinds]
    return [kind for kind in kinds if len(kind) > 1]


def _growth(kind):
    """`SignalReport.growth` of one of `_kinds`."""
    places, layers = zip(*kind)
    logarithms = [0.5 * math.log(layer.backward_moment) for layer in layers]
    steps, ends = places[-1] - places[0], logarithms[0] - logarithms[-1]
    line = -steps * statistics.linear_regression(places, logarithms).slope
    ends_agree = max(abs(ends), abs(line)) <= math.log(10) or 0.5 <= ratio(line, ends) <= 2
    total = ends if ends_agree else line
    return math.exp(total), math.exp(total / steps), steps


def _count(things, noun):
    number = things if isinstance(things, int) else len(things)
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _listed(names, shown=3):
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
