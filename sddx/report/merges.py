"""What students become when they are merged, over the share of the second, beside them and one of all rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from sddx.report import figures
from sddx.report.curves import MEASURES, Point, Run, alike, distinction
from sddx.report.sections import Figure, Section, Table
from sddx.report.subjects import having
from sddx.report.table import ABSENT, percent
from sddx.statistics.intervals import Interval, t_interval

SHARE = "merging.method.t"  # the choices that a merge is known by
STUDENTS = "merging.students"
NOTE = (
    "Recovery of what students become. Intervals are 95 % over seeds, or over items where there is one seed. The "
    "merge of two seeds of one data set is the control: it says what averaging alone does."
)


@dataclass(frozen=True)
class Merge:
    """Runs that merge two students by one method and differ in the share and in their seed alone."""

    where: str
    students: tuple[str, str]
    runs: list[Run]

    @property
    def name(self) -> str:
        """What the line of these runs is called."""
        ends = " to ".join(self.students)
        return f"{ends}, {self.where}" if self.where else ends

    def over_share(self, measure: str) -> list[Point]:
        """The merged model at each share."""
        shares = sorted({run["choices"][SHARE] for run in self.runs})
        points = [(share, [run for run in self.runs if run["choices"][SHARE] == share]) for share in shares]
        return [point for share, runs in points if (point := _point(share, runs, "merged", measure))]

    def ends(self, measure: str) -> list[Point]:
        """The students themselves."""
        names = [_subject(self.runs[0], student) for student in self.students]
        points = [_point(float(end), self._once(), name, measure) for end, name in enumerate(names) if name]
        return [point for point in points if point]

    def mixed(self, measure: str) -> Point | None:
        """The student of the rows of both."""
        name = having(self.runs[0], "mixed")
        return _point(0.5, self._once(), name, measure) if name else None

    def _once(self) -> list[Run]:
        """One run of each seed: students do not hang on the share."""
        return list({run["choices"]["seed"]: run for run in self.runs}.values())


def merges(runs: Sequence[Run]) -> list[Merge]:
    """The merges of two students over a share that is one number."""
    known = [run for run in runs if having(run, "merged") and isinstance(run["choices"].get(SHARE), (int, float))]
    known = [run for run in known if len(run["choices"].get(STUDENTS) or []) == 2]
    groups = alike(known, SHARE, STUDENTS, "seed")
    return [
        Merge(distinction(key, list(groups)), students, of)
        for key, group in groups.items()
        for students, of in _by_students(group).items()
    ]


def _by_students(runs: Sequence[Run]) -> dict[tuple[str, str], list[Run]]:
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        first, second = run["choices"][STUDENTS]
        groups.setdefault((first, second), []).append(run)
    return groups


def _subject(run: Run, student: str) -> str | None:
    """The name under which a run evaluated a student that it merged: its own, or the run's where they are one."""
    return student if student in run["recoveries"] else having(run, "student")


def _point(x: float, runs: Sequence[Run], name: str, measure: str) -> Point | None:
    records = [record for run in runs if (record := run["recoveries"].get(name)) and record[measure] is not None]
    if not records:
        return None
    return Point(x, _interval(records, measure), len(records))


def _interval(records: Sequence[Mapping[str, Any]], measure: str) -> Interval:
    values = [record[measure] for record in records]
    if len(values) > 1:
        return t_interval(values)
    if measure == "recovery" and records[0]["recovery_low"] is not None:
        return Interval(values[0], records[0]["recovery_low"], records[0]["recovery_high"], "items")
    return Interval(values[0], values[0], values[0], "nothing")


def merge_sections(runs: Sequence[Run]) -> list[Section]:
    """Recoveries over the share, drawn where it varies."""
    merged = merges(runs)
    varied = [merge for merge in merged if len({run["choices"][SHARE] for run in merge.runs}) > 1]
    drawn = [
        Figure(title, Markup(figures.over_share(varied, measure, title)), _table(merged, measure))
        for measure, title in MEASURES.items()
        if any(merge.over_share(measure) for merge in varied)
    ]
    return [Section("merges", "Students merged", None if drawn else _table(merged, "recovery"), NOTE, drawn)]


def _table(merged: Sequence[Merge], measure: str) -> Table:
    rows = []
    for merge in merged:
        ends = {point.x: point for point in merge.ends(measure)}
        points = [("first student", ends.get(0.0)), ("second student", ends.get(1.0))]
        points += [("of the rows of both", merge.mixed(measure))]
        points += [(f"merged, t = {point.x:g}", point) for point in merge.over_share(measure)]
        rows += [[merge.name, name, *_cells(point)] for name, point in points if point]
    return {"header": ["students", "model", "recovery", "95 % interval", "seeds"], "rows": rows}


def _cells(point: Point) -> list[str]:
    interval = point.interval
    bounds = f"{percent(interval.low)} to {percent(interval.high)} over {interval.contains}"
    within = ABSENT if interval.contains == "nothing" else bounds
    return [percent(interval.estimate), within, str(point.seeds)]
