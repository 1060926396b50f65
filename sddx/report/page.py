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
from sddx.report.agreement import correlation_table, matrix, summary_table
from sddx.report.curves import (
    AXES,
    MEASURES,
    VARIANTS,
    Difference,
    Family,
    Run,
    arms,
    differences,
    families,
    variants,
)
from sddx.report.law import fit, seed_curves
from sddx.report.table import MODELS, grid, percent
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
            run = json.loads(path.read_text())
            made, key = path.stat().st_mtime, json.dumps(run["choices"], sort_keys=True)
            if key not in found or made > found[key][0]:
                found[key] = (made, run)
    return sorted((run | {"store": str(root)} for _, run in found.values()), key=lambda run: str(run["choices"]))


def of_folders(folders: Iterable[Path]) -> list[Run]:
    """The finished runs below some folders."""
    paths = sorted(path for folder in folders for path in folder.rglob("summary.json"))
    return [json.loads(path.read_text()) for path in paths]


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
            f"{d.p_held_out:.3f}",
            _points(d.average),
            f"{d.p_average:.3f}",
        ]
        for d in found
    ]
    return {"header": ["runs", "arm minus sft", "seeds", "held-out", "p, Holm", "average", "p, Holm"], "rows": rows}


def _points(interval: Any) -> str:
    return f"{interval.estimate:+.1f} ({interval.low:+.1f} to {interval.high:+.1f})"


def task_table(runs: Sequence[Run]) -> Table:
    """Scores per task, unpruned, pruned, and recovered by every arm (means over its seeds)."""
    groups = arms(runs)
    tasks = list(runs[0]["scores"]["unpruned"])
    rows = []
    for task in tasks:
        starred = f"{task} *" if task in runs[0]["trained"] else task
        rows += [[starred, *(_score(runs, model, task) for model in MODELS[:2])]]
        rows[-1] += [_score(group, "recovered", task) for _, _, group in groups]
    labels = [arm if where == "all runs" else f"{arm}, {where}" for where, arm, _ in groups]
    return {"header": ["task", *MODELS[:2], *labels], "rows": rows}


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
    return {"header": ["arm", AXES[family.axis], "mean", "95 % interval", "seeds"], "rows": rows}


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
    """The block distances that cuts were chosen from, one figure for each scoring that the store still has."""
    found = []
    for key in sorted({run["artifacts"]["score"] for run in runs if "score" in run["artifacts"]}):
        scored = [run for run in runs if run["artifacts"].get("score") == key]
        place = find(Path(scored[0]["store"]), "score", key)
        mean_of = _scores(place)["mean"] if place else []
        if mean_of and isinstance(mean_of[0], list):
            total = len(mean_of) - 1
            cuts = {tuple(sorted(set(range(total)) - set(run["cut"]))) for run in scored}
            found.append({"svg": Markup(figures.distances(mean_of, [cut for cut in cuts if cut]))})
    return found


def _scores(place: Path) -> dict[str, Any]:
    return json.loads((place / "scores.json").read_text())["pruning"]


def agreements(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """How far the metrics agree that cuts were chosen by, for each kind of unit that several metrics scored."""
    found = []
    for units in sorted({run["choices"].get("units", "blocks") for run in runs}):
        scores = {}
        for run in runs:
            key, name = run["artifacts"].get("score"), run["choices"].get("pruning")
            if key and name and run["choices"].get("units", "blocks") == units and name not in scores:
                if place := find(Path(run["store"]), "score", key):
                    scores[name] = _scores(place)
        if len(scores) > 1:
            remove = max(run["choices"]["removed"] for run in runs)
            total = max(block for run in runs for block in run["cut"]) + 1
            table = summary_table(scores, remove, Units(units, total).names)
            svg = Markup(figures.agreement(list(scores), matrix(scores)))
            found.append({"units": units, "svg": svg, "table": table, "numbers": correlation_table(scores)})
    return found


def variant_tables(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """For each of metric, units and patch that varies: recovery before and after training, over how much was
    removed, and the figures."""
    sections = []
    for choice, label in VARIANTS.items():
        by_name = variants(runs, choice)
        if by_name:
            counts = sorted({count for places in by_name.values() for count in places})
            rows = [
                [where or "all runs", name, *(_before_after(places.get(count, [])) for count in counts)]
                for (where, name), places in by_name.items()
            ]
            header = ["runs", label, *(f"{count:g} removed" for count in counts)]
            drawn = [
                {"title": title, "svg": Markup(figures.over_removed(by_name, measure, title))}
                for measure, title in (("pruned_recovery", "Before training"), ("recovery", "After training"))
            ]
            sections.append({"label": label, "table": {"header": header, "rows": rows}, "figures": drawn})
    return sections


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
        title = f"Over {AXES[family.axis]}" + (f" ({family.fixed})" if family.fixed else "")
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
        "variants": variant_tables(runs),
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
    parts += [f"## By {v['label']}\n\n{grid(**v['table'])}" for v in found["variants"]]
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
