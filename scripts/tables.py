"""Fill the tables of README and docs/results, and draw the plots, from the JSON that the other scripts wrote.

python scripts/tables.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import training_methods
import transformers_page
import warmup_tables
from ablation import RESULTS, VARIANTS

from certtrain.runtime.files import write_text
from certtrain.studies.design import labels, load_study
from certtrain.studies.reading import study_path
from certtrain.studies.scaling.recommend import read_record, recommend
from certtrain.studies.trials import drawn

STUDIES = (
    "warmup_optimizers",
    "warmup_rates",
    "rewarm",
    "speedrun_choice",
    "speedrun_finalists",
    "speedrun",
    "speedrun_cnn7",
)  # of docs/results/warmup.md
ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    growth, runs = read("growth")["rows"], read("ablation")["rows"]
    plot_growth(growth)
    plot_ablation(runs)
    fill(RESULTS / "ablation.md", growth=growth_table(growth), runs=ablation_table(runs))
    fill(RESULTS / "methods.md", methods=methods_table(read("methods")["rows"]))
    if (RESULTS / "fusion.json").exists():
        fill(RESULTS / "methods.md", fusion=fusion_table(read("fusion")["rows"]))
    verification = {"settled": settled_table(read("branch_and_bound")["rows"]), "memory": memory_table()}
    fill(ROOT / "docs" / "verification.md", **verification)
    if (RESULTS / "soundness.json").exists():
        fill(ROOT / "docs" / "soundness.md", soundness=soundness_table(read("soundness")["networks"]))
    residual, costs = read("growth_residual")["rows"], read("costs")
    plot_residual_growth(residual)
    fill(RESULTS / "models.md", sizes=sizes_table(costs["models"]), growth=residual_growth_table(residual),
         costs=costs_table(costs["rows"]))  # fmt: skip
    profile = read("profile")
    fill(RESULTS / "profile.md", parts=profile_table(profile["rows"]), sizes=epochs_table(profile["sizes"]))
    for device in ("cpu", "cuda"):
        if (RESULTS / f"beside-authors-{device}.json").exists():
            fill(RESULTS / "benchmark.md", **{f"beside-{device}": beside_table(read(f"beside-authors-{device}"))})
    fill_studies()
    for device in ("cpu", "cuda"):
        if (RESULTS / f"benchmark-methods-{device}.json").exists():
            table = method_costs_table(read(f"benchmark-methods-{device}"))
            fill(RESULTS / "benchmark.md", **{f"methods-{device}": table})
    for device in ("cpu", "cpu-upstream", "cuda"):
        if (RESULTS / f"benchmark-{device}.json").exists():
            measured = read(f"benchmark-{device}")
            grown = RESULTS / f"growth-{device}.json"  # which gpu_hour.sh measures by itself
            growth_rows = read(grown.stem)["growth"] if grown.exists() else measured["growth"]
            tables = {device: benchmark_table(measured)}
            if growth_rows:
                tables[f"{device}-growth"] = benchmark_growth_table(growth_rows)
            fill(RESULTS / "benchmark.md", **tables)
    fill_warmup()
    fill_training_methods()
    fill_scaling()
    transformers_page.plot()
    transformers = {"digits-vit": seeds_table(of_setting("digits_vit")), **transformers_page.tables()}
    fill(RESULTS / "transformers.md", **transformers)
    fill(ROOT / "README.md", digits=seeds_table(of_setting("digits")))


def fill_warmup() -> None:
    """Of its four studies those that were gathered."""
    tables: dict[str, str] = {}
    gathered = {name: read(name) for name in STUDIES if (RESULTS / f"{name}.json").exists()}
    if optimizers := gathered.get("warmup_optimizers"):
        rows = optimizers["rows"]
        tables["optimizers"] = warmup_tables.optimizers_table(rows)
        tables["details"] = warmup_tables.details_table(rows, optimizers.get("first_steps", {}))
        warmup_tables.plot_optimizers(rows, RESULTS / "warmup_optimizers.png")
    if "warmup_rates" in gathered:
        tables["rates"] = warmup_tables.optimizers_table(gathered["warmup_rates"]["rows"])
    if "rewarm" in gathered:
        tables["rewarm"] = warmup_tables.rewarm_table(gathered["rewarm"]["rows"])
    if "speedrun_choice" in gathered:
        tables["choice"] = warmup_tables.recipes_table(gathered["speedrun_choice"]["rows"])
    if "speedrun_finalists" in gathered:
        tables["finalists"] = warmup_tables.recipes_table(gathered["speedrun_finalists"]["rows"])
    if "speedrun" in gathered:
        tables["speedrun"] = warmup_tables.networks_table(gathered["speedrun"]["rows"])
    if "speedrun_cnn7" in gathered:
        tables["speedrun-cnn7"] = warmup_tables.recipes_table(gathered["speedrun_cnn7"]["rows"])
    fill(RESULTS / "warmup.md", **tables)


def fill_scaling() -> None:
    """What `certtrain scale` wrote."""
    if (RESULTS / "scaling_small.json").exists():
        record = read("scaling_small")
        fits = record["fits"]["corrected"]
        tables = {"isoflop": isoflop_table(record), "laws": laws_table(fits), "foretold": foretold_table(fits)}
        if "kaplan" in record["fits"]:
            tables["protocols"] = protocols_table(record)
        tables["plan"] = plan_table(RESULTS / "scaling_small.json")
        fill(RESULTS.parent / "scaling.md", **tables)


def fill_training_methods() -> None:
    """From the studies' runs that were gathered, and CTRAIN's epochs where they were measured."""
    studies = read("training_methods")["studies"]
    tables = {f"eps-{n}-255": training_methods.methods_table(studies[f"methods_cifar10_{n}_255"]) for n in (2, 8)}
    tables |= {
        f"eps-{n}-255-differences": training_methods.differences_table(studies[f"methods_cifar10_{n}_255"])
        for n in (2, 8)
    }
    tables["batch-norm"] = training_methods.batch_norm_table(studies["batchnorm_cifar10"])
    if (RESULTS / "ctrain.json").exists():
        tables["ctrain"] = training_methods.ctrain_table(read("ctrain"))
    fill(RESULTS / "training_methods.md", **tables)


def fill_studies() -> None:
    """What `certtrain compare` and `certtrain tune` wrote."""
    page = RESULTS / "studies.md"
    if (RESULTS / "digits-methods.json").exists():
        compared = read("digits-methods")
        fill(page, methods=spreads_table(compared), paired=paired_table(compared))
    if (RESULTS / "tune-digits.json").exists():
        write_text(RESULTS / "tune-digits.svg", drawn(read("tune-digits")))
        fill(page, search=trials_table(read("tune-digits")))
    if (RESULTS / "tune-digits-test.json").exists():
        tested = read("tune-digits-test")
        fill(page, test=spreads_table(tested), difference=paired_table(tested))
    groups = read("board")["groups"] if (RESULTS / "board.json").exists() else []
    fill(RESULTS / "board.md", board=board_table(groups))


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def of_setting(name: str) -> list[dict[str, Any]]:
    return [run for run in reproduced() if run["setting"] == name]


def reproduced() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RESULTS / "reproduce.jsonl").read_text().splitlines()]


def fill(page: Path, **tables: str) -> None:
    """Put each table between `<!-- name -->` and `<!-- /name -->`, which the page must have."""
    text = page.read_text()
    for name, table in tables.items():
        first, last = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        head, opened, rest = text.partition(first)
        _, closed, tail = rest.partition(last)
        if not (opened and closed):
            raise SystemExit(f"{page}: no place for the table {name}: {first.strip()} … {last}")
        text = f"{head}{first}{table}\n{last}{tail}"
    write_text(page, text)


def seeds_table(summaries: list[dict[str, Any]]) -> str:
    lines = ["| seed | natural error | PGD error | verified error | seconds |", "|---:|---:|---:|---:|---:|"]
    for summary in summaries:
        errors = " | ".join(f"{100 * summary[key]:.1f} %" for key in ("natural_error", "pgd_error", "verified_error"))
        lines.append(f"| {summary['seed']} | {errors} | {summary['train_seconds']:.0f} |")
    return "\n".join(lines)


def methods_table(rows: list[dict[str, Any]]) -> str:
    engines = ("certtrain", "auto_LiRPA", "certtrain, as it is used")
    sides = "certtrain | auto_LiRPA | as used"
    lines = [f"| network | method | images | error: {sides} | s per image: {sides} |", "|---|---|" + "---:|" * 7]
    for row in (r for r in rows if r["engine"] == engines[0]):
        by_engine = {r["engine"]: r for r in rows if same_question(r, row)}
        found = [by_engine[engine] for engine in engines]
        errors = [r.get("failed") or f"{100 * r['verified_error']:.1f} %" for r in found]
        seconds = ["–" if "failed" in r else f"{r['seconds_per_image']:.3g}" for r in found]
        lines.append(f"| {row['network']} | {row['method']} | {row['images']} | {' | '.join([*errors, *seconds])} |")
    return "\n".join(lines)


def settled_table(rows: list[dict[str, Any]]) -> str:
    """Of each network, by what certtrain found: images, those that alpha-beta-CROWN settles too, and both times."""
    lines = [
        "| network | found | images | by alpha-beta-CROWN too | median s: certtrain | alpha-beta-CROWN "
        "| sum: certtrain | alpha-beta-CROWN |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for network, verdict in sorted({(row["network"], row["certtrain"]["verdict"]) for row in rows}):
        pairs = [
            (row["certtrain"], row["alpha-beta-CROWN"])
            for row in rows
            if (row["network"], row["certtrain"]["verdict"]) == (network, verdict)
        ]
        also = sum(other["verdict"] == verdict for _, other in pairs)
        seconds = [[side["seconds"] for side in sides] for sides in zip(*pairs, strict=True)]
        numbers = [f"{statistics.median(part):.2f}" for part in seconds] + [f"{sum(part):.0f}" for part in seconds]
        lines.append(f"| {network} | {verdict} | {len(pairs)} | {also} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def memory_table() -> str:
    lines = ["| `max_memory`, MiB | domains bounded | peak of the process, MiB |", "|---:|---:|---:|"]
    measured = read("search_memory")
    lines += [f"| {row['max_memory']} | {row['domains']:,} | {row['peak']:.0f} |" for row in measured["rows"]]
    return "\n".join([*lines, "", f"The peak grows by {measured['growth']:.2f} MiB with each MiB of `max_memory`."])


def method_costs_table(measured: dict[str, Any]) -> str:
    rows, versions = measured["rows"], measured["versions"]
    size = f"width {rows[0]['width']}, batch {rows[0]['batch']}"
    lines = [f"{versions['device']}, PyTorch {versions['torch']}; {size}.", ""]
    lines += [
        "| step | eager, of natural | compiled, of natural | compiled, of natural eager |",
        "|---|---:|---:|---:|",
    ]
    for eager in (row for row in rows if not row["compiled"]):
        (compiled,) = (row for row in rows if row["compiled"] and row["method"] == eager["method"])
        costs = eager["of_natural_alike"], compiled["of_natural_alike"], compiled["of_natural_eager"]
        lines.append(f"| {eager['method']} | {' | '.join(f'{cost:.2f}×' for cost in costs)} |")
    return "\n".join(lines)


def same_question(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[key] == other[key] for key in ("network", "method", "images"))


def soundness_table(networks: list[dict[str, Any]]) -> str:
    names = [row["bounds"] for row in networks[0]["rows"]]
    lines = ["| network | images | " + " | ".join(names) + " | points | outside | checked | s per image |"]
    lines.append("|---|---:|" + "---:|" * (len(names) + 4))
    for network in networks:
        cells = [f"{100 * row['verified_error']:.2f} % ({row['seconds']:.1f} s)" for row in network["rows"]]
        tail = f"{network['points']:,} | {network['outside']} | {network['checked']} | "
        tail += f"{network['checker_seconds_per_image']:.3f}"
        lines.append(f"| {network['network']} | {network['images']:,} | {' | '.join(cells)} | {tail} |")
    return "\n".join(lines)


def fusion_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| classes | loss | seconds per step | peak memory, MiB |", "|---:|---|---:|---:|"]
    lines += [f"| {r['classes']} | {r['form']} | {r['seconds']:.2f} | {r['peak_mebibytes']} |" for r in rows]
    return "\n".join(lines)


def profile_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| part | seconds | share |", "|---|---:|---:|"]
    return "\n".join(lines + [f"| {row['part']} | {row['seconds']:.2f} | {row['share']:.1%} |" for row in rows])


def epochs_table(rows: list[dict[str, Any]]) -> str:
    epochs = range(2, 2 + len(rows[0]["seconds_by_epoch"]))
    lines = ["| images | " + " | ".join(f"epoch {epoch}, s" for epoch in epochs) + " |"]
    lines.append("|---:|" + "---:|" * len(epochs))
    lines += [f"| {r['images']:,} | " + " | ".join(f"{s:.2f}" for s in r["seconds_by_epoch"]) + " |" for r in rows]
    return "\n".join(lines)


def benchmark_table(measured: dict[str, Any]) -> str:
    first = measured["rows"][0]
    versions = measured["versions"]
    title = f"{versions['device']}, PyTorch {versions['torch']}; width {first['width']}, batch {first['batch']}."
    lines = ["| step | ms | images/s | of natural | of auto_LiRPA | of the matrix-product rate | peak memory |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for row in measured["rows"]:
        cells = [f"{1000 * row['seconds']:.4g}", f"{row['images_per_second']:.4g}"]
        cells += [shown(row["of_natural"], "{:.2f}×"), shown(row["of_auto_lirpa"], "{:.2f}×")]
        cells += [shown(row["of_matrix_product_rate"], "{:.0%}")]
        cells += [shown(row["peak_bytes"] and row["peak_bytes"] / 2**20, "{:.0f} MiB")]
        lines.append(f"| {row['step']} | {' | '.join(cells)} |")
    return "\n".join([title, "", *lines])


def benchmark_growth_table(rows: list[dict[str, Any]]) -> str:
    steps = list(dict.fromkeys(row["step"] for row in rows))
    lines = [f"| batch | width | classes | {' | '.join(f'ms: {step}' for step in steps)} |"]
    lines.append("|---:|---:|---:|" + "---:|" * len(steps))
    for i in range(0, len(rows), len(steps)):
        size = " | ".join(str(rows[i][key]) for key in ("batch", "width", "classes"))
        lines.append(f"| {size} | " + " | ".join(f"{1000 * r['seconds']:.4g}" for r in rows[i : i + len(steps)]) + " |")
    return "\n".join(lines)


def beside_table(measured: dict[str, Any]) -> str:
    """A program to a row; errors are mean and range over its seeds, seconds of an epoch the median of all."""
    rows, setting = measured["rows"], measured["setting"]
    size = f"width {setting['width']}, {setting['images']:,} images, {setting['epochs']} epochs"
    lines = [f"{measured['versions']['device']}, PyTorch {measured['versions']['torch']}; {size}.", ""]
    lines.append(
        "| program | seeds | natural error | verified, by itself | by certtrain | s per epoch | processor s | MiB "
        "| to install | to write |"
    )
    lines.append("|---|" + "---:|" * 9)
    for name, program in measured["programs"].items():
        runs = [row for row in rows if row["program"] == name]
        if not runs:
            continue
        errors = [spread(runs, key) for key in ("natural_error", "verified_error", "by_certtrain")]
        costs = [f"{statistics.median(seconds for run in runs for seconds in run['seconds']):.2f}"]
        costs += [f"{statistics.median(run['processor_seconds'] for run in runs):.0f}"]
        costs += [f"{max(run['peak_bytes'] for run in runs) / 2**20:.0f}"]
        written = sum(map(len, program["written"]))
        cells = [name, str(len(runs)), *errors, *costs, str(len(program["install"])), str(written)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spreads_table(compared: dict[str, Any]) -> str:
    """The errors of `certtrain compare`'s groups over seeds, with the interval of the verified one's mean."""
    level = f"{compared['confidence']:.0%} interval"
    lines = [
        f"| configuration | seeds | natural error | PGD error | verified error | {level} | best | median | worst |"
    ]
    lines.append("|---|" + "---:|" * 8)
    for group in compared["groups"]:
        means = (plus_minus(group[key]) for key in ("natural_error", "pgd_error", "verified_error"))
        verified = group["verified_error"]
        cells = (f"{100 * verified[key]:.1f} %" for key in ("min", "median", "max"))
        interval = between(verified["interval"])
        lines.append(f"| {group['name']} | {len(group['seeds'])} | {' | '.join([*means, interval, *cells])} |")
    return "\n".join(lines)


def paired_table(compared: dict[str, Any]) -> str:
    """Differences of verified error to the baseline, by seed and by image, and McNemar's p of each seed."""
    level = f"{compared['confidence']:.0%}"
    lines = [
        f"| against {compared['baseline']} | difference | {level} over seeds | {level} over images | McNemar's p |"
    ]
    lines.append("|---|" + "---:|" * 4)
    for pair in compared["paired"]:
        tests = ", ".join(f"{test['p']:.2g}" for test in pair["mcnemar"].values())
        intervals = f"{between(pair['over_seeds'])} | {between(pair['over_images'])}"
        lines.append(f"| {pair['name']} | {100 * pair['difference']:+.1f} % | {intervals} | {tests} |")
    return "\n".join(lines)


def plus_minus(spread: dict[str, Any]) -> str:
    deviation = spread["deviation"]
    return f"{100 * spread['mean']:.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}") + " %"


def between(interval: dict[str, Any] | None) -> str:
    return "–" if interval is None else f"{100 * interval['low']:.1f} to {100 * interval['high']:.1f} %"


def trials_table(search: dict[str, Any]) -> str:
    keys = list(search["trials"][0]["settings"])
    lines = [f"| trial | natural error | verified error | {' | '.join(labels(keys))} |"]
    lines.append("|---|" + "---:|" * (2 + len(keys)))
    for trial in (trial for trial in search["trials"] if trial["values"]):
        name = f"{trial['number']}{', as shipped' * trial['is_base']}{', on the front' * trial['on_front']}"
        errors = (f"{100 * value:.1f} %" for value in trial["values"])
        settings = (
            shown(value, "{:.3g}") if isinstance(value, float) else value for value in trial["settings"].values()
        )
        lines.append(f"| {' | '.join(map(str, [name, *errors, *settings]))} |")
    return "\n".join(lines)


def board_table(compared: list[dict[str, Any]]) -> str:
    """Networks by recipes: natural and verified error, the mean over seeds, and their number."""
    found = {group["name"]: group for group in compared}
    cells = [cell.name.partition("_") for cell in load_study(study_path("board_cifar10_8_255")).cells]
    recipes, networks = (list(dict.fromkeys(cell[place] for cell in cells)) for place in (0, 2))
    lines = [f"| network | {' | '.join(recipes)} |", "|---|" + "---:|" * len(recipes)]
    for network in networks:
        groups = (found.get(f"{recipe}_{network}") for recipe in recipes)
        lines.append(f"| {network} | {' | '.join(map(board_cell, groups))} |")
    return "\n".join(lines)


def board_cell(group: dict[str, Any] | None) -> str:
    if group is None:
        return "not measured"
    errors = " / ".join(f"{100 * group[key]['mean']:.2f}" for key in ("natural_error", "verified_error"))
    return f"{errors} % ({len(group['seeds'])} seed{'s' * (len(group['seeds']) > 1)})"


def shown(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def growth_table(rows: list[dict[str, Any]]) -> str:
    layers = range(1, len(rows[0]["growth"]) + 1)
    lines = ["| initialization | BatchNorm | " + " | ".join(f"ReLU {i}" for i in layers) + " |"]
    lines.append("|---|---|" + "---:|" * len(layers))
    for row in rows:
        values = " | ".join(f"{value:.3g}" for value in row["growth"])
        lines.append(f"| {row['initialization']} | {'full' if row['batch_norm'] else 'none'} | {values} |")
    return "\n".join(lines)


def sizes_table(rows: list[dict[str, Any]]) -> str:
    data = list(dict.fromkeys(row["data"] for row in rows))
    lines = ["| model | " + " | ".join(f"{name}: parameters | M MACs" for name in data) + " |"]
    lines.append("|---|" + "---:|---:|" * len(data))
    for model in dict.fromkeys(row["model"] for row in rows):
        sizes = {row["data"]: row for row in rows if row["model"] == model}
        cells = (f"{sizes[name]['parameters']:,} | {sizes[name]['macs'] / 1e6:,.1f}" for name in data)
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def residual_growth_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| model | initialization | ReLUs | first | last | factor per ReLU |", "|---|---|---:|---:|---:|---:|"]
    for row in rows:
        first, *_, last = growth = row["growth"]
        factor = (last / first) ** (1 / (len(growth) - 1))
        cells = f"{row['model']} | {row['initialization']} | {len(growth)}"
        lines.append(f"| {cells} | {first:.3g} | {last:.3g} | {factor:.2f} |")
    return "\n".join(lines)


def isoflop_table(record: dict[str, Any]) -> str:
    """A budget to a row, a width to a column: verified error, and the epochs that the budget pays."""
    runs = {(run["budget"], run["width"]): run for run in record["runs"] if run["protocol"] == "corrected"}
    budgets, widths = (sorted(set(values)) for values in zip(*runs, strict=True))
    lines = ["| FLOP | " + " | ".join(f"width {width}" for width in widths) + " |", "|---:|" + "---:|" * len(widths)]
    for budget in budgets:
        found = (runs.get((budget, width)) for width in widths)
        cells = [
            f"{100 * statistics.fmean(run['verified_error']):.1f} ({run['epochs']})" if run else "–" for run in found
        ]
        lines.append(f"| {budget:.2e} | {' | '.join(cells)} |")
    return "\n".join(lines)


def laws_table(fits: dict[str, Any]) -> str:
    """What each approach says, with intervals: exponents, and the optimum at the compute that was asked for."""
    fitted = {approach: each for approach, each in fits.items() if "why_not" not in each}
    asked = next(iter(fitted.values()))["forecast"]["compute"]
    lines = ["| | " + " | ".join(fitted) + " |", "|---|" + "---:|" * len(fitted)]
    names = {"width": "optimal width", "epochs": "optimal epochs", "error": "verified error"}
    for name, title in names.items():
        laws = [each[name] for each in fitted.values()]
        cells = [with_interval(law["exponent"], law["exponent_interval"], ".2f") for law in laws]
        cells = [
            f"{cell} above {law['floor']:.1%}" if "floor" in law else cell
            for cell, law in zip(cells, laws, strict=True)
        ]
        lines.append(f"| {title}: exponent | {' | '.join(cells)} |")
    for name, title in names.items():
        form = ".1%" if name == "error" else ".3g"
        there = [each["forecast"][name] for each in fitted.values()]
        cells = [with_interval(each["value"], each["interval"], form) for each in there]
        lines.append(f"| {title} at {asked:.3g} FLOP | {' | '.join(cells)} |")
    return "\n".join(lines)


def foretold_table(fits: dict[str, Any]) -> str:
    """The error of each budget's best width, as measured and as each approach foretells it from those below."""
    rows: dict[float, dict[str, Any]] = {}
    for approach, fitted in fits.items():
        for row in fitted.get("foretold", ()):
            rows.setdefault(row["budget"], {})[approach] = row["error"]
    lines = ["| FLOP | measured | " + " | ".join(fits) + " |", "|---:|---:|" + "---:|" * len(fits)]
    for budget, errors in sorted(rows.items()):
        measured = next(iter(errors.values()))["measured"]
        cells = [
            with_interval(errors[name]["value"], errors[name]["interval"], ".1%") if name in errors else "–"
            for name in fits
        ]
        lines.append(f"| {budget:.2e} | {measured:.1%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def protocols_table(record: dict[str, Any]) -> str:
    """Runs of one width, length and seed by both protocols: epochs of warmup, verified errors, their difference."""
    runs: dict[str, dict[tuple, tuple[int, float]]] = {}
    for run in record["runs"]:
        for seed, error in zip(run["seeds"], run["verified_error"], strict=True):
            cell = run["budget"], run["width"], run["epochs"], seed
            runs.setdefault(run["protocol"], {})[cell] = run["warmup_epochs"], error
    lines = ["| FLOP | width | epochs | warmup | verified | warmup | verified | difference |", "|---:|" + "---:|" * 7]
    differences = []
    for cell in sorted(runs["kaplan"].keys() & runs["corrected"].keys()):
        (long, error), (short, other) = runs["corrected"][cell], runs["kaplan"][cell]
        differences.append(other - error)
        budget, width, epochs, _ = cell
        numbers = f"{long} | {error:.1%} | {short} | {other:.1%} | {100 * differences[-1]:+.1f}"
        lines.append(f"| {budget:.2e} | {width} | {epochs} | {numbers} |")
    lines.append(f"| mean | | | | | | | {training_methods.estimate(differences, signed=True)} |")
    return "\n".join(lines)


def plan_table(file: Path) -> str:
    """What `certtrain plan --approach joint` recommends, at the compute that was measured and tenfold."""
    record = read_record(file)
    lines = ["| FLOP | width | epochs | verified error |", "|---:|---:|---:|---:|"]
    for compute in (1e12, 1e13, 1e14):
        found = recommend(record, "corrected", "joint", compute, record.eps)
        width = with_interval(found.width, found.width_interval, ".0f")
        epochs = with_interval(found.epochs, found.epochs_interval, "d")
        error = with_interval(found.error, found.error_interval, ".1%")
        lines.append(f"| {compute:.0e} | {width} | {epochs} | {error} |")
    return "\n".join(lines)


def with_interval(value: float, interval: Sequence[float] | None, form: str) -> str:
    return f"{value:{form}}" + (f" ({interval[0]:{form}} to {interval[1]:{form}})" if interval else "")


def costs_table(rows: list[dict[str, Any]]) -> str:
    """In units of 10^12 multiply-accumulates an epoch, 10^15 a run."""
    lines = ["| config | epochs | ε = 0 | warmup | ε_max | whole run, 10¹⁵ |", "|---|---:|---:|---:|---:|---:|"]
    for row in rows:
        macs = " | ".join(brief(value / 1e12) if value else "–" for value in row["macs_per_epoch"].values())
        epochs = " + ".join(str(count) for count in row["epochs"].values())
        lines.append(f"| `{row['config']}` | {epochs} | {macs} | {brief(row['macs'] / 1e15)} |")
    return "\n".join(lines)


def brief(value: float) -> str:
    return f"{value:,.1f}" if value >= 1 else f"{value:.2g}"


def ablation_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| variant | seeds | natural error | PGD error | verified error | dead ReLUs | diverged at ε |"]
    lines.append("|---|---:|---:|---:|---:|---:|---|")
    for name in VARIANTS:
        runs = [row for row in rows if row["variant"] == name]
        cells = [spread(runs, key) for key in ("natural_error", "pgd_error", "verified_error", "dead")]
        diverged = ", ".join(f"{row['diverged_at']:.4f}" for row in runs if row["diverged_at"] is not None)
        lines.append(f"| {name} | {len(runs)} | " + " | ".join(cells) + f" | {diverged or 'none'} |")
    return "\n".join(lines)


def spread(rows: list[dict[str, Any]], key: str) -> str:
    """Mean and range over the seeds that ended, in percent."""
    values = [100 * row[key] for row in rows if key in row]
    return f"{statistics.mean(values):.1f} % ({min(values):.1f}–{max(values):.1f})" if values else "–"


def plot_growth(rows: list[dict[str, Any]]) -> None:
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for panel, batch_norm in zip(panels, (False, True), strict=True):
        for row in rows:
            if row["batch_norm"] == batch_norm:
                layers = range(1, len(row["growth"]) + 1)
                panel.semilogy(layers, row["growth"], marker="o", label=row["initialization"])
        panel.set(xlabel="ReLU", title="full BatchNorm, training mode" if batch_norm else "no BatchNorm")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("mean radius / radius at the input")
    panels[0].legend(title="initialization")
    figure.savefig(RESULTS / "growth.png", dpi=110)


def plot_residual_growth(rows: list[dict[str, Any]]) -> None:
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = plt.subplots(1, len(names), figsize=(12, 4), sharey=True, layout="constrained")
    for panel, name in zip(panels, names, strict=True):
        for row in (row for row in rows if row["model"] == name):
            layers = range(1, len(row["growth"]) + 1)
            panel.semilogy(layers, row["growth"], marker="o", label=row["initialization"])
        panel.set(xlabel="ReLU", title=f"{name}, no BatchNorm", xticks=layers)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("mean radius / radius at the input")
    panels[0].legend(title="initialization")
    figure.savefig(RESULTS / "growth_residual.png", dpi=110)


def plot_ablation(rows: list[dict[str, Any]]) -> None:
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(8, 4), layout="constrained")
    for position, name in enumerate(VARIANTS):
        runs = [row for row in rows if row["variant"] == name and "verified_error" in row]
        for key, colour in (("natural_error", "tab:blue"), ("pgd_error", "tab:orange"), ("verified_error", "tab:red")):
            values = [100 * row[key] for row in runs]
            label = key.replace("_", " ").replace("pgd", "PGD") if position == 0 else None
            panel.scatter([position] * len(values), values, color=colour, alpha=0.7, label=label)
    panel.set(xticks=range(len(VARIANTS)), xticklabels=list(VARIANTS), ylabel="error on test images, %")
    panel.grid(alpha=0.3)
    panel.legend()
    figure.savefig(RESULTS / "ablation.png", dpi=110)


if __name__ == "__main__":
    main()
