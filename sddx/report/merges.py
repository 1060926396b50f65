"""What students become when they are merged, over the share of the second, beside them and one of all rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean

from markupsafe import Markup

from sddx.records import STUDENTS
from sddx.report import figures
from sddx.report.curves import MEASURES, Point, Run, alike, called, distinction, interval_of
from sddx.report.sections import Figure, Section, Table
from sddx.report.subjects import having
from sddx.report.table import ABSENT, percent, within
from sddx.statistics.intervals import t_interval

Named = Callable[[Run], str | None]  # what a run calls one of its models
SHARE = "merging.method.t"  # the choice that a merge is drawn over
NOTE = (
    "Recovery of what students become. Intervals are 95 % over seeds, or over items where there is one seed. The "
    "merge of two seeds of one data set is the control: it says what averaging alone does. Trained skills are "
    "those of the run's own data set; another student's may be among the others."
)
GAIN_NOTE = (
    "Recovery of what students became minus the mean of theirs, and minus that of one student of the rows of all, "
    "in points; 95 % over seeds, paired, adjusted for nothing."
)


@dataclass(frozen=True)
class Merge:
    """Runs that merge the same students by one method and differ in the share, where it has one, and in their seed
    alone. Students that hang on the seed are named by how: seed=${seed}."""

    where: str
    students: tuple[str, ...]
    runs: list[Run]

    @property
    def name(self) -> str:
        """What the line of these runs is called."""
        ends = " to ".join(self.students)
        return f"{ends}, {self.where}" if self.where else ends

    @property
    def kinds(self) -> dict[str, list[Run]]:
        """The runs of each merged model, by what it is called: first those of one share each, by that."""
        ordered = sorted(self.runs, key=lambda run: (_share(run) is None, _share(run) or 0))
        kinds: dict[str, list[Run]] = {}
        for run in ordered:
            share, given = _share(run), run["choices"].get(SHARE)
            of = given if share is None else f"{share:g}"
            kinds.setdefault("merged" if given is None else f"merged, t = {of}", []).append(run)
        return kinds

    def over_share(self, measure: str) -> list[Point]:
        """The merged model at each share that is one number."""
        shared = [(share, runs) for runs in self.kinds.values() if (share := _share(runs[0])) is not None]
        return [point for share, runs in shared if (point := _point(share, runs, _merged, measure))]

    @property
    def own(self) -> list[Named]:
        """Its students, as runs call them."""
        return [partial(_subject, student=student) for student in self.students]

    def ends(self, measure: str) -> list[Point]:
        """The students themselves."""
        points = [_point(float(end), self._once(), student, measure) for end, student in enumerate(self.own)]
        return [point for point in points if point]

    def mixed(self, measure: str) -> Point | None:
        """The student of the rows of all."""
        return _point(0.5, self._once(), _mixed, measure)

    def _once(self) -> list[Run]:
        """One run of each seed: students do not hang on the share."""
        return list({run["choices"]["seed"]: run for run in self.runs}.values())


def merges(runs: Sequence[Run]) -> list[Merge]:
    """The merges of the same students by one method."""
    known = [run for run in runs if having(run, "merged") and run["choices"].get(STUDENTS)]
    groups = alike(known, SHARE, STUDENTS, "seed", merges=None)
    return [
        Merge(distinction(key, list(groups)), students, of)
        for key, group in groups.items()
        for students, of in _by_students(group).items()
    ]


def _by_students(runs: Sequence[Run]) -> dict[tuple[str, ...], list[Run]]:
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(run["choices"][STUDENTS]), []).append(run)
    return groups


def _share(run: Run) -> float | None:
    share = run["choices"].get(SHARE)
    return share if isinstance(share, (int, float)) else None


def _merged(run: Run) -> str | None:
    return having(run, "merged")


def _mixed(run: Run) -> str | None:
    return having(run, "mixed")


def _subject(run: Run, student: str) -> str | None:
    """The name under which a run evaluated a student that it merged: its own, or the run's where they are one."""
    name = called(student, run)
    return name if name in run["recoveries"] else having(run, "student")


def _level(run: Run, named: Named, measure: str) -> float | None:
    return (run["recoveries"].get(named(run)) or {}).get(measure)


def _point(x: float, runs: Sequence[Run], named: Named, measure: str) -> Point | None:
    records = [run["recoveries"][named(run)] for run in runs if _level(run, named, measure) is not None]
    return Point(x, interval_of(records, measure), len(records)) if records else None


def merge_sections(runs: Sequence[Run]) -> list[Section]:
    """Recoveries over the share, drawn where it varies, and what they are above the students'."""
    merged = merges(runs)
    varied = [merge for merge in merged if len(merge.students) == 2 and len(merge.over_share("recovery")) > 1]
    drawn = [
        Figure(title, Markup(figures.over_share(varied, measure, title)), _table(merged, measure))
        for measure, title in MEASURES.items()
        if any(merge.over_share(measure) for merge in varied)
    ]
    return [
        Section("merges", "Students merged", None if drawn else _table(merged, "recovery"), NOTE, drawn),
        Section("merge_gains", "Merged, minus its students", gain_table(merged), GAIN_NOTE),
    ]


def gain_table(merged: Sequence[Merge]) -> Table:
    """Of each merged model that several seeds have, how much more it brought back than its students."""
    rows = []
    for merge in merged:
        for name, runs in merge.kinds.items():
            for measure, title in MEASURES.items():
                gained = [gains(runs, measure, others) for others in (merge.own, [_mixed])]
                if any(len(points) > 1 for points in gained):
                    rows.append([merge.name, name, title, *map(_points, gained)])
    return {"header": ["students", "model", "measure", "minus their mean", "minus one of all rows"], "rows": rows}


def gains(runs: Sequence[Run], measure: str, others: Sequence[Named]) -> list[float]:
    """What is merged in each of these runs minus the mean of others of its models, in points; of the runs that have
    all of them."""
    points = []
    for run in runs:
        found = [_level(run, named, measure) for named in (_merged, *others)]
        levels = [level for level in found if level is not None]
        if len(levels) == len(found):
            points.append(100 * (levels[0] - mean(levels[1:])))
    return points


def _points(values: Sequence[float]) -> str:
    return f"{within(t_interval(values), '+.1f')}, {len(values)} seeds" if len(values) > 1 else ABSENT


def _table(merged: Sequence[Merge], measure: str) -> Table:
    rows = []
    for merge in merged:
        points = [(f"student {point.x + 1:g}", point) for point in merge.ends(measure)]
        points += [("of the rows of all", point) for point in [merge.mixed(measure)] if point]
        became = [(name, _point(0.5, runs, _merged, measure)) for name, runs in merge.kinds.items()]
        points += [(name, point) for name, point in became if point]
        rows += [[merge.name, name, *_cells(point)] for name, point in points]
    return {"header": ["students", "model", "recovery", "95 % interval", "seeds"], "rows": rows}


def _cells(point: Point) -> list[str]:
    interval = point.interval
    bounds = f"{percent(interval.low)} to {percent(interval.high)} over {interval.contains}"
    spread = ABSENT if interval.contains == "nothing" else bounds
    return [percent(interval.estimate), spread, str(point.seeds)]
