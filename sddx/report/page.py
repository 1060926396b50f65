"""The report: one HTML page, one Markdown page and one CSV file of what a set of runs found."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup

from sddx.errors import UserError
from sddx.evaluation.right_answers import MEASURES
from sddx.files.lines import lines
from sddx.records import REWRITES_FILE
from sddx.report import figures
from sddx.report.contrasts import Difference, differences, reading_differences
from sddx.report.curves import Family, Point, Run, arms, families, is_share, is_trained, mean_of
from sddx.report.drafts import draft_sections
from sddx.report.drift import drift_sections
from sddx.report.extraction import named, read_variously, readings
from sddx.report.headline import headline
from sddx.report.law import fit, seed_curves
from sddx.report.merges import merge_sections
from sddx.report.sections import Figure, Section, Table, agreements, heat_maps, variant_sections
from sddx.report.subjects import reference
from sddx.report.table import ABSENT, CHOOSING, grid, is_choosing, percent, within
from sddx.report.tasks import by_model
from sddx.report.tasks import section as task_section
from sddx.run_folder import SUMMARY, folder_of, read_summary
from sddx.statistics.intervals import Interval
from sddx.store.manifest import find
from sddx.sweep import cells

log = logging.getLogger(__name__)

COLUMNS = (
    "gap_closed recovery recovery_low recovery_high recovery_trained recovery_held_out recovery_above_chance "
    "pruned_recovery fallback_share examples supervised_tokens steps"
).split()

# What must be known to read a table.
PAIRED = """Same items and same seeds; 95 % intervals over seeds, p of the paired t test adjusted by Holm within its
column. Of one seed the interval is over items, which does not say what another training run would give. The last
column is the average for other seeds and other items. A claim needs equal examples and equal supervised tokens, and
each arm at its own learning rate."""
LAW = """Recovery over training examples n, fitted to the mean over seeds; intervals are 95 % over resampled
seed-curves. Where the data carries no law, that is said."""
MEASURED = ("bits per byte", "minus unpruned", "margin, nats", "minus unpruned")
LIKELY = """Means over seeds, from the likelihoods that tasks are scored by; they vary less than right and wrong do.
Bits per byte: -log2 p(right answer | prompt) over its bytes, less is better. Margin: its log-probability minus
that of the likeliest wrong answer, more is better."""
READ = """Means over seeds, of tasks whose written answers can be read in several ways: strictly, in the format of
the references, or flexibly. References teach that format and self-written answers do not, so that a strict score
favours SFT: hold arms against each other under both. Unparsed is the share of answers in which the filter found
nothing; the primary reading is the score of all other tables."""
READ_PAIRED = "Same items and same seeds; 95 % intervals over seeds, p adjusted by Holm over this table."
COST = "Seconds of each stage when it was built, means over seeds."


def of_store(root: Path) -> list[Run]:
    """The newest finished run of every set of choices in a store."""
    paths = (root / "report").glob("*/*/summary.json")
    runs = _newest(path for path in paths if (path.parent / "manifest.json").is_file())
    return sorted((run | {"store": str(root)} for run in runs), key=lambda run: str(run["choices"]))


def of_folders(folders: Iterable[Path]) -> list[Run]:
    """The newest finished run of every set of choices below some folders, or that of a summary.json."""
    return _newest(sorted(path for folder in map(folder_of, folders) for path in folder.rglob(SUMMARY)))


def _newest(paths: Iterable[Path]) -> list[Run]:
    """Of the runs of one set of choices the newest: what stands in two sweeps, or was built again by other code, is
    one run and not two seeds."""
    newest: dict[str, tuple[float, Run]] = {}
    for path in paths:
        if (run := _summary(path)) is not None:
            made, key = path.stat().st_mtime, json.dumps(run["choices"], sort_keys=True)
            newest[key] = max(newest.get(key, (made, run)), (made, run), key=lambda each: each[0])
    return [run for _, run in newest.values()]


def require_runs(runs: Sequence[Run], where: str) -> None:
    """Raises UserError where there are none."""
    if not runs:
        raise UserError(f"There is no finished run in {where}. Give the folder of a run or a sweep.")


def _summary(path: Path) -> Run | None:
    """A run's summary; None, with a warning, for a file that is none: one that is damaged must not cost the
    report of the others."""
    try:
        return {"store": ""} | read_summary(path) | {"folder": str(path.parent)}
    except UserError as error:
        log.warning("left out: %s", error)
        return None


def failed(folders: Iterable[Path]) -> list[tuple[str, str, str]]:
    """(name, state, reason) of every cell below these folders that began and is not done."""
    failures = []
    for path in sorted(path for folder in folders for path in folder.rglob(cells.RECORD)):
        try:
            cell = cells.look(path.parent)
        except UserError as error:
            cell = {"name": path.parent.name, "state": "unknown", "reason": str(error)}
        if cell["state"] not in ("done", "waiting"):
            failures.append((cell["name"], cell["state"], cell.get("reason", "")))
    return failures


def arm_table(runs: Sequence[Run]) -> Table:
    """Per arm that trained, the means over its seeds of what it brought back and what it cost."""
    shares = (
        "gap_closed", "pruned_recovery", "recovery_held_out", "recovery_trained", "recovery", "fallback_share"
    )  # fmt: skip
    counts = ("examples", "supervised_tokens", "steps")
    rows, rollouts = [], any(run.get("rollouts") for run in runs)
    for where, arm, group in arms([run for run in runs if is_trained(run)]):
        seconds = mean(run["seconds"].get("train", 0) for run in group)
        values = [percent(mean_of(group, name)) for name in shares] + [
            f"{mean_of(group, name):,.0f}" for name in counts
        ]
        rate = _plain(group[0]["choices"].get("learning_rate"))
        written = _rollouts(group) if rollouts else []
        rows.append([where, arm, rate, str(len(group)), *values, f"{seconds:.0f}", *written])
    header = ["runs", "arm", "rate", "seeds", "gap closed", "untrained", "held-out", "trained", "recovery"]
    header += ["refused", "examples", "supervised tokens", "steps", "train s"]
    return {"header": [*header, *(["written tokens", "writing s"] if rollouts else [])], "rows": rows}


def _rollouts(runs: Sequence[Run]) -> list[str]:
    """Tokens that students wrote in their training, and the seconds of it, means; nothing where none wrote."""
    records = [record for run in runs if (record := run.get("rollouts"))]
    if not records:
        return [ABSENT, ABSENT]
    return [f"{mean(record[name] for record in records):,.0f}" for name in ("tokens", "seconds")]


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def difference_table(compared: Sequence[Difference]) -> Table:
    """Every arm minus SFT, in points with 95 % intervals."""
    rows = [
        [
            d.where,
            d.arm,
            str(d.seeds),
            _points(d.held_out),
            _p(d.p_held_out),
            _points(d.average),
            _p(d.p_average),
            ABSENT if d.items is None else f"{d.items:,}",
            _points(d.both),
        ]
        for d in compared
    ]
    header = ["runs", "arm minus sft", "seeds", "held-out", "p held-out", "average", "p average", "items"]
    header += ["average, other items too"]
    return {"header": header, "rows": rows}


def forests(compared: Sequence[Difference]) -> list[Figure]:
    """The same, drawn: over all tasks, and over those that were not trained on where that is another picture."""
    columns = {"All tasks": [(d, d.average) for d in compared]}
    if any(d.held_out and _points(d.held_out) != _points(d.average) for d in compared):
        columns["Tasks that were not trained on"] = [(d, d.held_out) for d in compared if d.held_out]
    return [Figure(title, Markup(figures.forest(rows, title))) for title, rows in columns.items() if rows]


def _p(value: float | None) -> str:
    if value is None:
        return "-"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _points(interval: Interval | None) -> str:
    if interval is None:
        return ABSENT
    over = "" if interval.contains == "seeds" else f" over {interval.contains}"
    return within(interval, "+.1f") + over


def likelihood_table(runs: Sequence[Run]) -> Table:
    """What each model has of every measure of likelihood, by task and on average, and its difference to the
    unpruned one (means over seeds)."""
    rows = by_model([run for run in runs if run.get("likelihoods")], _likelihoods)
    return {"header": ["runs", "model", "task", *MEASURED], "rows": rows}


def _likelihoods(runs: Sequence[Run], model: str) -> list[list[str]]:
    known = [run for run in runs if model in run["likelihoods"]]
    tasks = dict.fromkeys(task for run in known for of in run["likelihoods"][model].values() for task in of)
    cells = {task: [_likelihood(known, model, measure, task) for measure in MEASURES] for task in tasks}
    return [[task, *(cell for pair in of for cell in pair)] for task, of in cells.items()]


def _likelihood(runs: Sequence[Run], model: str, measure: str, task: str) -> tuple[str, str]:
    """The mean of a measure, and of its difference to the unpruned model."""
    both = [(run["likelihoods"][model][measure], run["likelihoods"][reference(run)][measure]) for run in runs]
    pairs = [(own[task], base[task]) for own, base in both if task in own]
    if not pairs:
        return ABSENT, ABSENT
    value, base = (mean(side) for side in zip(*pairs, strict=True))
    return f"{value:.3f}", f"{value - base:+.3f}"


def reading_table(runs: Sequence[Run]) -> Table:
    """The score under each filter, and the share of answers that it could not read, of every model (means over
    seeds); for tasks whose answers can be read in several ways, or not at all."""
    about = partial(_read, read_variously(runs))
    return {"header": ["runs", "model", "task", "read by", "score", "unparsed"], "rows": by_model(runs, about)}


def _read(tasks: Collection[str], runs: Sequence[Run], model: str) -> list[list[str]]:
    by_run = [readings(run, tasks).get(model, {}) for run in runs]
    rows = []
    for key in dict.fromkeys(key for read in by_run for key in read):
        read = [each[key] for each in by_run if key in each]
        shares = [reading.unparsed for reading in read if reading.unparsed is not None]
        score, unparsed = percent(mean(r.score for r in read)), percent(mean(shares) if shares else None)
        rows.append([key[0], named(runs[0], key), score, unparsed])
    return rows


def reading_difference_table(runs: Sequence[Run]) -> Table:
    """Every arm minus SFT under each filter, in points with 95 % intervals over seeds."""
    rows = [
        [d.where, d.arm, str(d.seeds), d.task, d.read_by, _points(d.interval), _p(d.p)]
        for d in reading_differences(runs)
    ]
    return {"header": ["runs", "arm minus sft", "seeds", "task", "read by", "difference", "p"], "rows": rows}


def curve_table(family: Family, measure: str) -> Table:
    """The numbers behind a figure."""
    rows = [
        [arm, f"{point.x:g}", _height(point, measure), _band(point, measure), str(point.seeds)]
        for arm in family.arms
        for point in family.curve(arm, measure)
    ]
    return {"header": ["arm", family.label, "mean", "95 % interval", "seeds"], "rows": rows}


def _height(point: Point, measure: str) -> str:
    return _number(point.interval.estimate, measure) + (" %" if is_share(measure) else "")


def _band(point: Point, measure: str) -> str:
    if point.interval.contains == "nothing":
        return ABSENT
    low, high = (_number(bound, measure) for bound in (point.interval.low, point.interval.high))
    return f"{low} to {high} over {point.interval.contains}"


def _number(value: float, measure: str) -> str:
    """A share in per cent, a perplexity as it is."""
    return f"{100 * value:.1f}" if is_share(measure) else f"{value:,.2f}"


def funnel_table(runs: Sequence[Run]) -> Table:
    """What became of the self-written answers, per set of runs, and how they compare with their references; means
    over runs. The surprise is the unpruned model's, in nats a token, by accepted answers and their references."""
    rows = [
        [where, arm, percent(1 - share), percent(share), *_written([run.get("written") for run in group])]
        for where, arm, group in arms(runs)
        if (share := mean_of(group, "fallback_share")) is not None
    ]
    compared = ["copied", "cut off", "ROUGE-L", "words", "of references", "surprise", "by references"]
    return {"header": ["runs", "arm", "accepted", "refused", *compared], "rows": rows}


def _written(records: Sequence[Mapping[str, Any] | None]) -> list[str]:
    known = [each for each in records if each and each["rouge_l"] is not None]
    if not known:
        return [ABSENT] * 7
    shares = [percent(mean(each[name] for each in known)) for name in ("copied", "cut_off")]
    words = [f"{mean(each['words'][name] for each in known):.0f}" for name in ("self", "reference")]
    read = [each["surprise"]["unpruned"] for each in known if each["sample"]]
    surprise = [f"{mean(each[name] for each in read):.2f}" if read else ABSENT for name in ("self", "reference")]
    return [*shares, f"{mean(each['rouge_l'] for each in known):.2f}", *words, *surprise]


def cost_table(runs: Sequence[Run]) -> Table:
    """Seconds and peak memory of each stage, and the parameters that are left."""
    stages = list(dict.fromkeys(stage for run in runs for stage in run["seconds"]))
    rows = []
    for where, arm, group in arms(runs):
        spent = [[run["seconds"][stage] for run in group if stage in run["seconds"]] for stage in stages]
        peak = max((memory for run in group for memory in run["peak_memory"].values()), default=0)
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
                predictions = "; ".join(f"{100 * goal:.0f} %: {law.predict(goal)}" for goal in goals)
                rows.append([family.fixed or "all runs", arm, measure, formula, predictions])
    return {"header": ["runs", "arm", "measure", "law", "examples for a recovery of"], "rows": rows}


def examples(runs: Sequence[Run], shown: int = 3) -> list[dict[str, Any]]:
    """Some answers that were accepted and some that were refused, from the first run that wrote its own."""
    for run in runs:
        # Runs of before answers were selected by themselves have them where they were written.
        stage = "select" if run["artifacts"].get("select") else "distill"
        keys = run["artifacts"].get(stage) or []
        places = [place for key in keys if (place := find(Path(run["store"]), stage, key))]
        rows = [json.loads(line) for at in places for line in lines(at / REWRITES_FILE)]
        if rows:
            kinds = [[row for row in rows if not row["reason"]], [row for row in rows if row["reason"]]]
            return [row for kind in kinds for row in kind[:shown]]
    return []


def contents(runs: Sequence[Run], failures: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
    """Everything that the page shows."""
    return {
        "runs": runs,
        "headline": headline(runs),
        "choosing": choosing(runs),
        "sections": sections(runs, failures),
        "examples": examples(runs),
    }


def sections(runs: Sequence[Run], failures: Sequence[tuple[str, str, str]]) -> list[Section]:
    """The parts of the report, in their order; those that have nothing to show are left out."""
    cells = {"header": ["cell", "state", "reason"], "rows": [list(cell) for cell in failures]}
    compared = differences(runs)
    parts = [
        *curve_sections(runs),
        Section("arms", "What each arm brought back", arm_table(runs), "Means over seeds."),
        Section(
            "differences",
            "Paired differences to SFT, in points",
            difference_table(compared),
            PAIRED,
            forests(compared),
        ),
        Section("laws", "Scaling laws", law_table(runs), LAW),
        task_section(runs),
        Section("likelihoods", "Likelihood of right answers", likelihood_table(runs), LIKELY),
        Section("readings", "Scores under each filter", reading_table(runs), READ),
        Section(
            "reading_differences",
            "Paired differences to SFT under each filter, in points",
            reading_difference_table(runs),
            READ_PAIRED,
        ),
        *variant_sections(runs),
        *agreements(runs),
        heat_maps(runs),
        *merge_sections(runs),
        *draft_sections(runs),
        *drift_sections(runs),
        Section("answers", "Self-written answers", funnel_table(runs)),
        Section("cost", "Cost", cost_table(runs), COST, cost_figures(runs)),
        Section("failed", "Cells that are not done", cells),
    ]
    return [section for section in parts if section.figures or section.tables]


def curve_sections(runs: Sequence[Run]) -> list[Section]:
    """For every family of curves, a figure of each measure that it has."""
    parts = []
    for number, family in enumerate(families(runs), start=1):
        title = f"Over {family.label}" + (f" ({family.fixed})" if family.fixed else "")
        drawn = [
            Figure(label, Markup(figures.curves(family, name, label)), curve_table(family, name))
            for name, label in family.measures.items()
            if any(family.curve(arm, name) for arm in family.arms)
        ]
        parts.append(Section(f"curves {number}", title, figures=drawn))
    return parts


def cost_figures(runs: Sequence[Run]) -> list[Figure]:
    """Quality over cost, where anything was trained."""
    svg = Markup(figures.quality_against_cost(runs))
    return [Figure("Quality against cost", svg)] if any(map(is_trained, runs)) else []


def choosing(runs: Sequence[Run]) -> str:
    """What must be said where runs were evaluated on selection items; empty where none was."""
    on_selection = [run for run in runs if is_choosing(run)]
    return f"{len(on_selection)} of {len(runs)} runs were evaluated on {CHOOSING}." if on_selection else ""


def html(page: dict[str, Any]) -> str:
    """The page, with everything inside it."""
    environment = Environment(loader=PackageLoader("sddx.report", "."), autoescape=select_autoescape(["html"]))
    return environment.get_template("page.html").render(page)


def markdown(page: dict[str, Any]) -> str:
    """The tables of the page."""
    parts = [page["headline"], *([page["choosing"]] if page["choosing"] else [])]
    for section in page["sections"]:
        parts += [f"## {title}\n\n{grid(**table)}" for title, table in section.tables.items()]
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
