"""The report: one HTML page, one Markdown page and one CSV file of what a set of runs found."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup

from sddx.records import Units
from sddx.report import figures
from sddx.report.agreement import correlation_table, matrix, per_unit, summary_table
from sddx.report.curves import (
    MEASURES,
    VARIANTS,
    Difference,
    Family,
    Run,
    Variant,
    arms,
    differences,
    families,
    variant_differences,
    variants,
)
from sddx.report.law import fit, seed_curves
from sddx.report.table import grid, percent
from sddx.store.manifest import find
from sddx.sweep import cells

COLUMNS = (
    "recovery recovery_low recovery_high recovery_trained recovery_held_out recovery_above_chance gap_closed "
    "pruned_recovery fallback_share examples supervised_tokens steps"
).split()
Table = dict[str, Any]  # header: list of str, rows: list of lists of str


def of_store(root: Path) -> list[Run]:
    """The newest finished run of every set of choices in a store."""
    found: dict[str, tuple[float, Run]] = {}
    for path in (root / "report").glob("*/*/summary.json"):
        if (path.parent / "manifest.json").is_file():
            run = json.loads(path.read_text()) | {"folder": str(path.parent)}
            made, key = path.stat().st_mtime, json.dumps(run["choices"], sort_keys=True)
            if key not in found or made > found[key][0]:
                found[key] = (made, run)
    return sorted((run | {"store": str(root)} for _, run in found.values()), key=lambda run: str(run["choices"]))


def of_folders(folders: Iterable[Path]) -> list[Run]:
    """The finished runs below some folders."""
    paths = sorted(path for folder in folders for path in folder.rglob("summary.json"))
    runs = [json.loads(path.read_text()) | {"folder": str(path.parent)} for path in paths]
    # One run may stand in two sweeps, and must not count as two.
    return list({json.dumps([run["choices"], run["artifacts"]], sort_keys=True): run for run in runs}.values())


def failed(folders: Iterable[Path]) -> list[tuple[str, str, str]]:
    """(name, state, reason) of every cell below these folders that began and is not done."""
    paths = sorted(path for folder in folders for path in folder.rglob(cells.RECORD))
    found = [(cells.read(path.parent), cells.state(path.parent)) for path in paths]
    return [(r["name"], state, r.get("reason", "")) for r, state in found if state not in ("done", "waiting")]


def arm_table(runs: Sequence[Run]) -> Table:
    """Per arm, the means over its seeds of what it brought back and what it cost."""
    shares = (
        "pruned_recovery", "recovery_held_out", "recovery_trained", "recovery", "gap_closed", "fallback_share"
    )  # fmt: skip
    counts = ("examples", "supervised_tokens", "steps")
    rows = []
    for where, arm, group in arms(runs):
        seconds = mean(run["seconds"]["train"] for run in group)
        found = [percent(_mean(group, name)) for name in shares] + [f"{_mean(group, name):,.0f}" for name in counts]
        rate = _plain(group[0]["choices"].get("learning_rate"))
        rows.append([where, arm, rate, str(len(group)), *found, f"{seconds:.0f}"])
    header = ["runs", "arm", "rate", "seeds", "untrained", "held-out", "trained", "recovery", "gap closed"]
    return {"header": [*header, "refused", "examples", "supervised tokens", "steps", "train s"], "rows": rows}


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _mean(runs: Sequence[Run], name: str) -> float | None:
    values = [run[name] for run in runs if run.get(name) is not None]
    return mean(values) if values else None


def difference_table(found: Sequence[Difference]) -> Table:
    """Every arm minus SFT, in points with 95 % intervals over seeds."""
    rows = [
        [
            d.where,
            d.arm,
            str(d.seeds),
            _points(d.held_out),
            _p(d.p_held_out),
            _points(d.average),
            _p(d.p_average),
        ]
        for d in found
    ]
    return {
        "header": ["runs", "arm minus sft", "seeds", "held-out", "p held-out", "average", "p average"],
        "rows": rows,
    }


def _p(value: float | None) -> str:
    if value is None:
        return "-"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _points(interval: Any) -> str:
    return f"{interval.estimate:+.1f} ({interval.low:+.1f} to {interval.high:+.1f})"


def task_table(runs: Sequence[Run]) -> Table:
    """Scores per task: of the unpruned model, of every pruned one, and of what every arm recovered from it (means
    over its seeds)."""
    tasks = list(dict.fromkeys(task for run in runs for task in run["scores"]["unpruned"] if task != "average"))
    tasks.append("average")
    rows: list[list[str]] = []
    for where, arm, group in arms(runs):
        model = str(group[0]["choices"].get("model", ""))
        unpruned = [f"model {model}", "unpruned", *(_score(group[:1], "unpruned", task) for task in tasks)]
        pruned = [where, "pruned", *(_score(group[:1], "pruned", task) for task in tasks)]
        rows += [row for row in (unpruned, pruned) if row not in rows]
        rows += [[where, arm, *(_score(group, "recovered", task) for task in tasks)]]
    trained = {task for run in runs for task in run["trained"]}
    starred = [f"{task} *" if task in trained else task for task in tasks]
    return {"header": ["runs", "model", *starred], "rows": rows}


def _score(runs: Sequence[Run], model: str, task: str) -> str:
    values = [run["scores"][model][task] for run in runs if task in run["scores"][model]]
    return f"{100 * mean(values):.1f}" if values else "-"


def curve_table(family: Family, measure: str) -> Table:
    """The numbers behind a figure."""
    rows = [
        [arm, f"{point.x:g}", percent(point.interval.estimate), _band(point), str(point.seeds)]
        for arm in family.arms
        for point in family.curve(arm, measure)
    ]
    return {"header": ["arm", family.label, "mean", "95 % interval", "seeds"], "rows": rows}


def _band(point: Any) -> str:
    if point.interval.contains == "nothing":
        return "-"
    return f"{100 * point.interval.low:.1f} to {100 * point.interval.high:.1f} over {point.interval.contains}"


def funnel_table(runs: Sequence[Run]) -> Table:
    """What became of the self-written answers, per set of runs."""
    rows = [
        [where, arm, percent(1 - share), percent(share)]
        for where, arm, group in arms(runs)
        if (share := _mean(group, "fallback_share")) is not None
    ]
    return {"header": ["runs", "arm", "accepted", "refused"], "rows": rows}


def cost_table(runs: Sequence[Run]) -> Table:
    """Seconds and peak memory of each stage, and the parameters that are left."""
    stages = list(dict.fromkeys(stage for run in runs for stage in run["seconds"]))
    rows = []
    for where, arm, group in arms(runs):
        spent = [[run["seconds"][stage] for run in group if stage in run["seconds"]] for stage in stages]
        peak = max(memory for run in group for memory in run["peak_memory"].values())
        parameters = f"{group[0]['parameters']['pruned']:,} of {group[0]['parameters']['unpruned']:,}"
        rows.append(
            [where, arm, *(f"{mean(s):.1f}" if s else "-" for s in spent), f"{peak / 2**30:.2f}", parameters]
        )
    return {"header": ["runs", "arm", *stages, "peak GiB", "parameters"], "rows": rows}


def law_table(runs: Sequence[Run]) -> Table:
    """For every arm over data sizes, the fitted law and the examples that some recoveries are predicted to take."""
    rows = []
    for family in (family for family in families(runs) if family.axis == "size"):
        for arm in family.arms:
            of_arm = [run for run in family.runs if run["choices"]["loss"] == arm]
            for measure in ("recovery_trained", "recovery"):
                law = fit(seed_curves(of_arm, measure))
                if isinstance(law, str):
                    rows.append([family.fixed or "all runs", arm, measure, law, ""])
                    continue
                formula = f"{100 * law.ceiling:.1f} - {100 * law.drop:.1f} (n / {law.first:,.0f})^-{law.rate:.2f} %"
                level = law.ceiling - law.drop * (law.largest / law.first) ** -law.rate
                goals = [round(level, 2) - 0.05, round(level, 2), round(level, 2) + 0.01]
                told = "; ".join(f"{100 * goal:.0f} %: {law.predict(goal)}" for goal in goals)
                rows.append([family.fixed or "all runs", arm, measure, formula, told])
    return {"header": ["runs", "arm", "measure", "law", "examples for a recovery of"], "rows": rows}


def heat_maps(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The distances that cuts were chosen from, one figure for each scoring that the store still has."""
    found = []
    for key in sorted({run["artifacts"]["score"] for run in runs if "score" in run["artifacts"]}):
        scored = [run for run in runs if run["artifacts"].get("score") == key]
        mean_of = _scores(scored[0]).get("mean", [])
        if mean_of and isinstance(mean_of[0], list):
            cuts = {_removed(run) for run in scored}
            found.append({"svg": Markup(figures.distances(mean_of, [cut for cut in cuts if cut]))})
    return found


def _scores(run: Run) -> dict[str, Any]:
    """What a run's cut was chosen by; empty where the store has it no more."""
    place = find(Path(run["store"]), "score", run["artifacts"]["score"])
    return json.loads((place / "scores.json").read_text()).get("pruning", {}) if place else {}


def _removed(run: Run) -> tuple[int, ...]:
    """The numbers of the units that a run removed."""
    halves = run.get("no_attention", []), run.get("no_feedforward", [])
    whole = sorted(set(range(run.get("blocks", max(run["cut"]) + 1))) - set(run["cut"]))
    units = run["choices"].get("units", "blocks")
    if units == "sublayers":
        both = [unit for block in whole for unit in (2 * block, 2 * block + 1)]
        return tuple(sorted([*both, *(2 * b for b in halves[0]), *(2 * b + 1 for b in halves[1])]))
    return tuple({"blocks": whole, "attention": halves[0], "feedforward": halves[1]}[units])


def agreements(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """How far the metrics agree that cuts were chosen by, for each model and kind of unit that several metrics
    scored."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if "score" in run["artifacts"] and run["choices"].get("pruning"):
            units = run["choices"].get("units", "blocks")
            groups.setdefault((run["artifacts"]["model"], units), []).append(run)
    found = []
    for (_, units), group in groups.items():
        # Some metrics are measured for a number of units to remove: those of the largest cut are compared.
        by_name = {run["choices"]["pruning"]: run for run in sorted(group, key=lambda r: r["choices"]["removed"])}
        scores = {name: kept for name, run in by_name.items() if (kept := _scores(run))}
        counts = {len(per_unit(kept["mean"])) for kept in scores.values()}
        if len(scores) > 1 and len(counts) == 1:
            count = counts.pop()
            remove = max(run["choices"]["removed"] for run in group)
            names = Units(units, count // 2 if units == "sublayers" else count).names
            svg = Markup(figures.agreement(list(scores), matrix(scores)))
            table, numbers = summary_table(scores, remove, names), correlation_table(scores)
            found.append({"units": units, "svg": svg, "table": table, "numbers": numbers})
    return found


def variant_sections(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """For each of metric, units and patch that varies: recovery before and after training over how much was
    removed, differences, scores per task before training, and figures."""
    sections = []
    for choice, (label, _, base) in VARIANTS.items():
        if found := variants(runs, choice):
            drawn = [
                {"title": title, "svg": Markup(figures.over_removed(found, measure, title))}
                for measure, title in (("pruned_recovery", "Before training"), ("recovery", "After training"))
            ]
            sections.append(
                {
                    "label": label,
                    "base": base,
                    "figures": drawn,
                    "table": _variant_table(found, label),
                    "differences": _variant_differences(runs, choice, label),
                    "tasks": _variant_tasks(found, label),
                }
            )
    return sections


def _variant_table(found: Sequence[Variant], label: str) -> Table:
    counts = sorted({count for variant in found for count in variant.runs})
    rows = [
        [variant.where or "all runs", variant.name, *(_before_after(variant.runs.get(n, [])) for n in counts)]
        for variant in found
    ]
    return {"header": ["runs", label, *(f"{count:g} removed" for count in counts)], "rows": rows}


def _variant_differences(runs: Sequence[Run], choice: str, label: str) -> Table:
    rows = [
        [d.where or "all runs", d.name, f"{d.removed:g}", str(d.seeds), _shares(d.before), _shares(d.after)]
        for d in variant_differences(runs, choice)
    ]
    return {"header": ["runs", label, "removed", "seeds", "before training", "after training"], "rows": rows}


def _shares(interval: Any) -> str:
    """An interval of shares, in points, with what it is over."""
    points = [100 * value for value in (interval.estimate, interval.low, interval.high)]
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*points) + f" over {interval.contains}"


def _variant_tasks(found: Sequence[Variant], label: str) -> Table:
    """Scores per task of the pruned model before training: whether one choice trades tasks against each other."""
    first = next(iter(found[0].runs.values()))[0]
    tasks = list(first["scores"]["pruned"])
    rows = [
        [variant.where or "all runs", variant.name, f"{count:g}", *(_score(runs, "pruned", task) for task in tasks)]
        for variant in found
        for count, runs in variant.runs.items()
    ]
    return {"header": ["runs", label, "removed", *tasks], "rows": rows}


def _before_after(runs: Sequence[Run]) -> str:
    if not runs:
        return "-"
    before, after = (percent(_mean(runs, name)).removesuffix(" %") for name in ("pruned_recovery", "recovery"))
    return f"{before} → {after}"


def examples(runs: Sequence[Run], shown: int = 3) -> list[dict[str, Any]]:
    """Some answers that were accepted and some that were refused, from the first run that wrote its own."""
    for run in runs:
        keys = run["artifacts"].get("distill") or []
        places = [place for key in keys if (place := find(Path(run["store"]), "distill", key))]
        rows = [json.loads(line) for at in places for line in (at / "rewrites.jsonl").read_text().splitlines()]
        if rows:
            kinds = [[row for row in rows if not row["reason"]], [row for row in rows if row["reason"]]]
            return [row for kind in kinds for row in kind[:shown]]
    return []


def contents(runs: Sequence[Run], failures: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
    """Everything that the page shows."""
    sections = []
    for family in families(runs):
        title = f"Over {family.label}" + (f" ({family.fixed})" if family.fixed else "")
        drawn = [
            {"title": label, "svg": Markup(figures.curves(family, name, label)), "table": curve_table(family, name)}
            for name, label in MEASURES.items()
            if any(family.curve(arm, name) for arm in family.arms)
        ]
        sections.append({"title": title, "figures": drawn})
    return {
        "runs": runs,
        "sections": sections,
        "arms": arm_table(runs),
        "differences": difference_table(differences(runs)),
        "tasks": task_table(runs),
        "variants": variant_sections(runs),
        "agreements": agreements(runs),
        "heat_maps": heat_maps(runs),
        "funnel": funnel_table(runs),
        "examples": examples(runs),
        "laws": law_table(runs),
        "cost": cost_table(runs),
        "cost_svg": Markup(figures.quality_against_cost(runs)),
        "failed": {"header": ["cell", "state", "reason"], "rows": [list(cell) for cell in failures]},
    }


def html(found: dict[str, Any]) -> str:
    """The page, with everything inside it."""
    environment = Environment(loader=PackageLoader("sddx.report", "."), autoescape=select_autoescape(["html"]))
    return environment.get_template("page.html").render(found)


def markdown(found: dict[str, Any]) -> str:
    """The tables of the page."""
    titles = {
        "arms": "What each arm brought back", "differences": "Paired differences to SFT, in points",
        "tasks": "Scores per task",
        "laws": "Scaling laws", "funnel": "Self-written answers", "cost": "Cost", "failed": "Failed cells",
    }  # fmt: skip
    parts = [f"## {title}\n\n{grid(**found[name])}" for name, title in titles.items() if found[name]["rows"]]
    for variant in found["variants"]:
        titles = {"table": "", "differences": f", minus {variant['base']}, in points", "tasks": ", before training"}
        parts += [
            f"## By {variant['label']}{title}\n\n{grid(**variant[name])}"
            for name, title in titles.items()
            if variant[name]["rows"]
        ]
    parts += [f"## Agreement of metrics, {a['units']}\n\n{grid(**a['table'])}" for a in found["agreements"]]
    for section in found["sections"]:
        parts += [
            f"## {section['title']}: {f['title'].lower()}\n\n{grid(**f['table'])}" for f in section["figures"]
        ]
    return "\n\n".join(parts) + "\n"


def table_of_runs(runs: Sequence[Run]) -> str:
    """One CSV line a run: its choices, its recoveries, its seconds."""
    names = list(dict.fromkeys(name for run in runs for name in run["choices"]))
    stages = list(dict.fromkeys(stage for run in runs for stage in run["seconds"]))
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow([*names, *COLUMNS, *(f"seconds_{stage}" for stage in stages)])
    for run in runs:
        chosen = [run["choices"].get(name) for name in names]
        writer.writerow([*chosen, *(run.get(name) for name in COLUMNS), *(run["seconds"].get(s) for s in stages)])
    return buffer.getvalue()
