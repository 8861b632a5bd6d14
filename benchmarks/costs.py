"""The tables of what the method costs, from the result files of step_time, memory, scaling, orthogonality and the others."""

import json
import re
import statistics

from runs import table


def cost_tables(results):
    """Returns `{marker: Markdown table}` for every table of costs; `results` is the folder of all result files."""
    makers = {
        "step time": step_time_table,
        "cost summary": summary_table,
        "memory": memory_table,
        "onednn": onednn_table,
        "backends": backends_table,
        "lazy": lazy_table,
        "scaling": scaling_table,
        "orthogonality": orthogonality_table,
        "loop": loop_table,
        "input pipeline": input_table,
        "photographs": photographs_table,
        "inference": inference_table,
    }
    commands = command_table(results, [marker.replace(" ", "_") for marker in makers])
    return {marker: make(results) for marker, make in makers.items()} | {"cost commands": commands}


def load(results, benchmark):
    """Returns `[(file's stem, content)]` of one benchmark."""
    return [(path.stem, json.loads(path.read_text())) for path in sorted((results / benchmark).glob("*.json"))]


def where(result):
    return result.get("gpu") or f"{result['cpu_cores']} cores"


def quartiles(values):
    low, median, high = values
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def step_time_parts(stem):
    """Returns `(compared, net, image size, batch, precision, device)` of a result file's name."""
    *parts, precision, device = re.fullmatch(r"(\w+)-(\w+)-(\d+)-(\d+)-(\w+)-(\w+)", stem).groups()
    return *parts, precision.replace("_xla", ", XLA"), device


def step_time_table(results):
    """A table for each comparison: a line for each arm and a column for each net, precision and device."""
    comparisons = {}
    for stem, result in load(results, "step_time"):
        compared, net, size, batch, precision, _ = step_time_parts(stem)
        alone = compared == "penalties"
        trained = f"{net}'s penalties alone" if alone else f"{net}, {size} pixels, batch {batch}"
        column = f"{trained}, {precision}, {where(result)}"
        baseline, *_ = arms = result["arms"]
        for name, arm in arms.items():
            cell = f"{1000 * arm['median_seconds']:.3g} ms" if name == baseline else quartiles(arm["ratio_quartiles"])
            comparisons.setdefault("regularizers" if alone else compared, {}).setdefault(name, {})[column] = cell
    tables = []
    for arms in comparisons.values():
        columns = list(dict.fromkeys(column for cells in arms.values() for column in cells))
        rows = [[name, *(cells.get(column, "") for column in columns)] for name, cells in arms.items()]
        tables.append(table(["arm", *columns], rows))
    return "\n\n".join(tables)


def summary_table(results):
    """The method's own arms, each against L2, one line for each net, precision and device."""
    wanted = {
        "penalty": "OrthonormalRegularizer",
        "neighbour": "OrthonormalRegularizer and modulation by the neighbour",
        "anchor": "OrthonormalRegularizer and modulation by the anchor",
    }
    rows = []
    for stem, result in load(results, "step_time"):
        compared, net, size, batch, precision, _ = step_time_parts(stem)
        if compared in ("modulation", "method"):
            ratios = [quartiles(result["arms"][arm]["ratio_quartiles"]) for arm in wanted.values()]
            rows.append([f"{net}, {size} pixels, batch {batch}", precision, where(result), *ratios])
    header = ["net", "precision", "device", "penalty", "penalty and modulation by the neighbour", "... by the anchor"]
    return table(header, rows)


def memory_table(results):
    rows = []
    for stem, result in load(results, "memory"):
        net, size, batch, precision, _ = re.fullmatch(r"(\w+)-(\d+)-(\d+)-(\w+)-(\w+)", stem).groups()
        for name, arm in result["arms"].items():
            low, high = (f"{value / 2**20:.0f}" for value in (min(arm["peak_bytes"]), max(arm["peak_bytes"])))
            median = f"{statistics.median(arm['peak_bytes']) / 2**20:.0f} ({low} to {high})"
            rows.append([name, f"{net}, {size} pixels, batch {batch}", precision, where(result), median, f"{arm['ratio']:.3f}"])
    return table(["arm", "net", "precision", "device", "peak, MiB (least to most)", "ratio of medians"], rows)


def onednn_table(results):
    rows = []
    for stem, result in load(results, "onednn"):
        net, size, batch, precision, _ = re.fullmatch(r"(\w+)-(\d+)-(\d+)-(\w+)-(\w+)", stem).groups()
        for name, arm in result["arms"].items():
            figures = [f"{1000 * arm['median_seconds']:.3g}", quartiles(arm["ratio_quartiles"])]
            rows.append([name, f"{net}, {size} pixels, batch {batch}", precision, where(result), *figures])
    return table(["arm", "net", "precision", "device", "step, ms", "ratio (quartiles)"], rows)


def scaling_table(results):
    rows = []
    for _, result in load(results, "scaling"):
        for name, arm in result["arms"].items():
            for row in arm["rows"]:
                figures = [f"{row[key]:.3g}" for key in ("build_seconds", "trace_seconds", "first_step_seconds")]
                rows.append([name, row["depth"], *figures, f"{1000 * row['step_seconds']:.3g}"])
            exponents = [f"depth^{value}" for value in arm["exponents"].values()]
            rows.append([name, f"fit up to {result['fitted_up_to']}", *exponents])
    return table(["arm", "layers", "build, s", "trace, s", "first step, s", "step, ms"], rows)


def orthogonality_table(results):
    """Each arm at each factor: the mean over seeds of the residual, and of test accuracy."""
    rows = []
    for _, result in load(results, "orthogonality"):
        arms = {}
        for row in result["rows"]:
            residual, accuracy = statistics.mean(row["residuals"]), 100 * statistics.mean(row["accuracies"])
            arms.setdefault(row["arm"], {})[row["factor"]] = f"{residual:.3g} ({accuracy:.1f} %)"
        factors = sorted({factor for cells in arms.values() for factor in cells})
        rows += [[name, *(cells.get(factor, "") for factor in factors)] for name, cells in arms.items()]
        header = ["arm", *(f"factor {factor:g}" for factor in factors)]
    return table(header, rows)


def backends_table(results):
    rows = []
    for stem, result in load(results, "backends"):
        backend, net, size, batch, _ = stem.split("-")
        for name, arm in result["arms"].items():
            place = [name, backend, f"{net}, {size} pixels, batch {batch}", where(result)]
            rows.append(
                [*place, f"{1000 * arm['median_seconds']:.3g}", quartiles(arm["ratio_quartiles"]), arm["first_step_seconds"]]
            )
    return table(["arm", "backend", "net", "device", "step, ms", "ratio (quartiles)", "first step, s"], rows)


def lazy_table(results):
    rows = []
    for stem, result in load(results, "lazy"):
        net, size, batch, _ = stem.split("-")
        for name, arm in result["arms"].items():
            place = [name, f"{net}, {size} pixels, batch {batch}", where(result), result["arithmetic_share"]]
            rows.append([*place, f"{1000 * arm['median_seconds']:.3g}", quartiles(arm["ratio_quartiles"]), arm["residual"]])
    return table(["penalty", "net", "device", "arithmetic", "step, ms", "ratio (quartiles)", "residual"], rows)


def loop_table(results):
    rows = []
    for stem, result in load(results, "loop"):
        net, size, batch, _ = stem.split("-")
        ratios = [quartiles(figures["ratio_quartiles"]) for figures in result["ratios"].values()]
        speed = next(iter(result["ratios"].values()))["loop_images_per_second"]
        rows.append([f"{net}, {size} pixels, batch {batch}", where(result), f"{speed:.0f}", *ratios])
    header = ["net", "device", "images/s", "over one call of a graph for the epoch (quartiles)", "over Keras's fit (quartiles)"]
    return table(header, rows)


def input_table(results):
    rows = []
    for stem, result in load(results, "input_pipeline"):
        net = stem.partition("-")[0]
        for name, figures in result["pipelines"].items():
            rates = [figures[f"{part}_images_per_second"] for part in ("pipeline", "step")]
            rates = [f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}" for rate in rates]
            rows.append([name, net, where(result), *rates, quartiles(figures["ratio_quartiles"])])
        rows.append(["a folder, read and decoded once", "", where(result), result["files_decoded_per_second"], "", ""])
    return table(["images in", "net", "device", "pipeline, images/s", "step, images/s", "ratio (quartiles)"], rows)


def photographs_table(results):
    rows = []
    for _, result in load(results, "photographs"):
        for way, figures in result["ways"].items():
            rows.append([way, where(result), figures["images_per_second"], quartiles(figures["ratio_quartiles"])])
    return table(["photographs of 500 x 375 pixels", "device", "images/s", "over decoding alone (quartiles)"], rows)


def inference_table(results):
    rows = []
    for _, result in load(results, "inference"):
        for row in result["rows"]:
            memory = f"{row['peak_activation_bytes'] / 2**20:.3g}"
            figures = [f"{row['median_milliseconds']:.3g}", quartiles(row["ratio_quartiles"]), memory]
            rows.append([row["arm"], row["batch"], where(result), *figures])
    return table(["net", "images", "device", "latency, ms", "ratio (quartiles)", "peak activations, MiB"], rows)


def command_table(results, kinds):
    """The command, commit, hardware and versions behind each result file of the tables above."""
    rows = []
    for kind in kinds:
        for stem, result in load(results, kind):
            versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
            machine = result.get("gpu") or f"{result['cpu_cores']} of {result['processor']}"
            place = [machine, versions, result["commit"][:10]]
            rows.append([f"`{result['command']}`", f"`{kind}/{stem}.json`", *place])
    return table(["command", "result file", "device", "versions", "commit"], rows)
