"""How far models moved from the unpruned one, by arm, and what of that goes with skills lost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from markupsafe import Markup

from sddx.report import figures
from sddx.report.curves import Run, arms, judged, seed_of, value_of
from sddx.report.drafts import FEWEST
from sddx.report.sections import Figure, Section, Table
from sddx.report.subjects import UNTUNED, having, shown_as
from sddx.report.table import within
from sddx.statistics.intervals import Interval, rank_correlation, t_interval

# What is measured, by its name in tables: where it stands in a record of `drift`. The first two are the predictors
# that were named beforehand; all others are exploratory.
MEASURES: dict[str, str] = {
    "KL on prompts": "kl.prompts.nats",
    "surprise of data": "surprise.unpruned.learned.nats",
    "KL on references": "kl.references.nats",
    "KL on own samples": "kl.samples.nats",
    "KL on text": "kl.text.nats",
    "own surprise by data": "surprise.model.learned.nats",
    "own surprise by references": "surprise.model.reference.nats",
    "own bits per byte, references": "surprise.model.reference.bits_per_byte",
    "top 20 % on prompts": "kl.prompts.top",
    "least CKA": "least",
    "words": "answers.mean_length",
    "repeated 4-grams": "answers.repetition",
    "cut off": "answers.cut_off",
}
NAMED = tuple(MEASURES)[:2]
NOTE = (
    "KL(unpruned || model) and surprise, under the unpruned model or the model's own, in nats a token, on held-out "
    "rows and texts (docs/drift.md). Means over seeds with 95 % intervals over them. Items lost and won flipped "
    "from right to wrong and back, over all tasks that are right or wrong, means over seeds."
)
PASSED = (
    "The chance that one of k answers to a held-out prompt is right, drawn at one temperature: a skill that is "
    "lost stays low at every k, one that is demoted comes back. Means over seeds with 95 % intervals over them."
)
PAIRED = "On the same rows and seeds; 95 % over seeds."
PREDICTORS = (
    "Skills lost are 1 minus the recovery on skills that were not trained on; bits per byte are those of right "
    "answers, which vary less. A point is an arm at one cut, the mean over its seeds less that of the cut's arms, "
    "which leaves one point fewer free at each cut. Rank correlations are told from "
    f"{FEWEST} free points on, with 95 % as if those were drawn independently. The "
    "first two predictors were named beforehand; the rest is exploratory."
)
Key = tuple[str, str]  # what tells runs from others, the arm
Record = dict[str, Any]
Lost = Callable[[Run, str], float | None]


def drift_sections(runs: Sequence[Run]) -> list[Section]:
    """How far each arm moved, the arms' paired differences to SFT, and what of it goes with skills lost."""
    records, cuts = drifts(runs), _by_cut(runs)
    points = {name: centred(cuts, lost) for name, lost in LOST.items()}
    table, drawn = predictor_table(points), predictor_figures(points[SKILLS])
    return [
        Section("drift", "How far models moved", drift_table(records), NOTE),
        Section("drift_differences", "Drift, paired differences to SFT", difference_table(records), PAIRED),
        Section("passes", "Whether one of several answers is right", pass_table(records), PASSED),
        Section("predictors", "What goes with skills lost", table, PREDICTORS, drawn),
    ]


def _skills(run: Run, student: str) -> float | None:
    return _less(1, run.get("recovery_held_out"))


def _bits(run: Run, student: str) -> float | None:
    return value_of(run.get("likelihoods", {}).get(student), "bits_per_byte.average")


SKILLS = "skills lost"
LOST: dict[str, Lost] = {SKILLS: _skills, "bits per byte": _bits}  # what a student lost by; more is worse


def drifts(runs: Sequence[Run]) -> dict[Key, dict[int, Record]]:
    """By seed, what was measured of each arm's student, and of the pruned model, which is one whichever arm and
    seed the run had, but for what the arms' data says of it."""
    records: dict[Key, dict[int, Record]] = {}
    for where, arm, _, name, group in judged([run for run in runs if run.get("drift")]):
        for run in (run for run in group if name in run["drift"]):
            seeds = records.setdefault((where, shown_as(run, name, arm)), {})
            seeds[seed_of(run, name)] = _looked_at(run, name, run["drift"][name])
    return records


def _looked_at(run: Run, name: str, record: Record) -> Record:
    """A record with the least CKA of its blocks and the items that flipped."""
    flipped = [each for each in run.get("flipped", {}).get(name, {}).values() if each]
    items = {way: sum(each[way] for each in flipped) for way in ("right_to_wrong", "wrong_to_right")}
    return {**record, **items, "least": min(record["similarity"]["blocks"].values(), default=None)}


def drift_table(records: Mapping[Key, Mapping[int, Record]]) -> Table:
    """A row for each model; of the pruned one nothing of data, which arms differ in."""
    flips = {"lost": "right_to_wrong", "won": "wrong_to_right"}
    rows = []
    for (where, model), seeds in records.items():
        count = "-" if model == UNTUNED else str(len(seeds))
        asked = {name: "" if model == UNTUNED and "data" in name else place for name, place in MEASURES.items()}
        measures = [_cell([value_of(each, place) for each in seeds.values()]) for place in asked.values()]
        items = [f"{mean(each[way] for each in seeds.values()):.1f}" for way in flips.values()]
        rows.append([where, model, count, *measures, *items])
    return {"header": ["runs", "model", "seeds", *MEASURES, *(f"items {way}" for way in flips)], "rows": rows}


def pass_table(records: Mapping[Key, Mapping[int, Record]]) -> Table:
    """A row for each model whose answers were drawn, and one for the unpruned one beside the pruned."""
    drawn = {key: [each["passes"] for each in seeds.values() if "passes" in each] for key, seeds in records.items()}
    counts = list(dict.fromkeys(k for passes in drawn.values() for each in passes for k in each["model"]))
    rows = []
    for (where, model), passes in drawn.items():
        sides = {"unpruned": "unpruned", model: "model"} if model == UNTUNED else {model: "model"}
        for name, side in sides.items() if passes else ():
            shares = [[100 * each[side][k] for each in passes if k in each[side]] for k in counts]
            count = "-" if model == UNTUNED else str(len(passes))
            rows.append([where, name, count, *(_cell(each, digits=1) for each in shares)])
    return {"header": ["runs", "model", "seeds", *(f"pass@{k}, %" for k in counts)], "rows": rows}


def _cell(values: Sequence[float | None], sign: str = "", digits: int = 3) -> str:
    """The mean, and the interval over seeds where there are two."""
    known, form = [value for value in values if value is not None], f"{sign}.{digits}f"
    if len(known) < 2:
        return f"{known[0]:{form}}" if known else "-"
    return within(t_interval(known), form)


def difference_table(records: Mapping[Key, Mapping[int, Record]]) -> Table:
    """A row for each student but SFT's, beside SFT's of at least two seeds in common."""
    rows = []
    for (where, arm), seeds in records.items():
        base = records.get((where, "sft"), {})
        common = sorted(seeds.keys() & base.keys())
        if arm not in (UNTUNED, "sft") and len(common) > 1:
            differences = [
                _cell([_less(value_of(seeds[seed], at), value_of(base[seed], at)) for seed in common], "+")
                for at in MEASURES.values()
            ]
            rows.append([where, f"{arm} - sft", str(len(common)), *differences])
    return {"header": ["runs", "models", "seeds", *MEASURES], "rows": rows}


def _less(mine: float | None, theirs: float | None) -> float | None:
    return None if mine is None or theirs is None else mine - theirs


@dataclass
class Points:
    """What arms lost against one measure, by arm: (the measure, what was lost), both less their means over the
    arms of the same cut; and of how many cuts."""

    by_arm: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    cuts: int = 0

    @property
    def free(self) -> int:
        """How many of the points say something of their own: centring takes one from each cut."""
        return sum(map(len, self.by_arm.values())) - self.cuts


def _by_cut(runs: Sequence[Run]) -> list[list[tuple[str, list[Run]]]]:
    """The arms of each cut with their runs, whatever else their training differed in."""
    cuts: dict[tuple, list[tuple[str, list[Run]]]] = defaultdict(list)
    for _, arm, group in arms([run for run in runs if run.get("drift")]):
        cuts[group[0]["artifacts"]["model"], tuple(group[0]["cut"])].append((arm, group))
    return list(cuts.values())


def centred(cuts: Sequence[Sequence[tuple[str, list[Run]]]], lost: Lost) -> dict[str, Points]:
    """By measure what each arm lost against it; of measures and cuts that two arms have."""
    found = {measure: _centred(place, cuts, lost) for measure, place in MEASURES.items()}
    return {measure: points for measure, points in found.items() if points.cuts}


def _centred(place: str, cuts: Sequence[Sequence[tuple[str, list[Run]]]], lost: Lost) -> Points:
    points = Points()
    for held in cuts:
        pairs = [(arm, pair) for arm, group in held if (pair := _point(group, place, lost)) is not None]
        if len(pairs) > 1:
            middle = [mean(side) for side in zip(*(pair for _, pair in pairs), strict=True)]
            points.cuts += 1
            for arm, pair in pairs:
                points.by_arm[arm].append((pair[0] - middle[0], pair[1] - middle[1]))
    return points


def _point(runs: Sequence[Run], place: str, lost: Lost) -> tuple[float, float] | None:
    """An arm's measure and what it lost, means over its seeds; None where one of them does not have either."""
    pairs = []
    for run in runs:
        if not (student := having(run, "student")) or not (record := run["drift"].get(student)):
            return None
        moved, less = value_of(_looked_at(run, student, record), place), lost(run, student)
        if moved is None or less is None:
            return None
        pairs.append((moved, less))
    return mean(moved for moved, _ in pairs), mean(less for _, less in pairs)


def predictor_table(found: Mapping[str, Mapping[str, Points]]) -> Table:
    """A row for each measure, those that were named beforehand first, the others by how far their rank correlation
    with skills lost is from 0."""
    rows = []
    for measure, of in found[SKILLS].items():
        ranked = [_ranked(points.get(measure)) for points in found.values()]
        if first := ranked[0]:
            count = sum(map(len, of.by_arm.values()))
            told = [within(each, ".2f") if each else "-" for each in ranked]
            row = [measure, _kind(measure), str(count), str(of.free), *told]
            rows.append((measure not in NAMED, -abs(first.estimate), row))
    header = ["measure", "named", "points", "free", *(f"rank correlation with {name}" for name in found)]
    return {"header": header, "rows": [row for *_, row in sorted(rows)]}


def _ranked(points: Points | None) -> Interval | None:
    """The rank correlation; None of too few points."""
    if points is None or points.free < FEWEST:
        return None
    pairs = [pair for each in points.by_arm.values() for pair in each]
    return rank_correlation(*zip(*pairs, strict=True), free=points.free)


def _kind(measure: str) -> str:
    return "beforehand" if measure in NAMED else "exploratory"


def predictor_figures(points: Mapping[str, Points]) -> list[Figure]:
    """Skills lost against the two predictors that were named beforehand."""
    named = {measure: points[measure].by_arm for measure in NAMED if measure in points}
    drawn = {measure: figures.scattered(of, f"{measure}, centred", "skills lost") for measure, of in named.items()}
    return [Figure(f"Skills lost against {measure}", Markup(svg)) for measure, svg in drawn.items()]
