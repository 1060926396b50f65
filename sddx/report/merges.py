"""What students become when they are merged, over the share of the second, beside them and one of all rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from markupsafe import Markup

from sddx.records import STUDENTS
from sddx.report import figures
from sddx.report.curves import MEASURES, Point, Run, alike, called, distinction, interval_of
from sddx.report.sections import Figure, Section, Table
from sddx.report.subjects import having
from sddx.report.table import ABSENT, percent

SHARE = "merging.method.t"  # the choice that a merge is drawn over
NOTE = (
    "Recovery of what students become. Intervals are 95 % over seeds, or over items where there is one seed. The "
    "merge of two seeds of one data set is the control: it says what averaging alone does."
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

    def over_share(self, measure: str) -> list[Point]:
        """The merged model at each share that is one number."""
        shares = sorted(
            {share for run in self.runs if isinstance(share := run["choices"].get(SHARE), (int, float))}
        )
        points = [(share, [run for run in self.runs if run["choices"][SHARE] == share]) for share in shares]
        return [point for share, runs in points if (point := _point(share, runs, _merged, measure))]

    def others(self, measure: str) -> dict[str, Point]:
        """The merged models of a method that knows no share, or has one for each block, by what they are called."""
        kinds: dict[str, list[Run]] = {}
        for run in (run for run in self.runs if _share(run) is None):
            given = run["choices"].get(SHARE)
            kinds.setdefault("merged" if given is None else f"merged, t = {given}", []).append(run)
        points = {name: _point(0.5, runs, _merged, measure) for name, runs in kinds.items()}
        return {name: point for name, point in points.items() if point}

    def ends(self, measure: str) -> list[Point]:
        """The students themselves."""
        points = [
            _point(float(end), self._once(), partial(_subject, student=student), measure)
            for end, student in enumerate(self.students)
        ]
        return [point for point in points if point]

    def mixed(self, measure: str) -> Point | None:
        """The student of the rows of all."""
        return _point(0.5, self._once(), partial(having, role="mixed"), measure)

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


def _subject(run: Run, student: str) -> str | None:
    """The name under which a run evaluated a student that it merged: its own, or the run's where they are one."""
    name = called(student, run)
    return name if name in run["recoveries"] else having(run, "student")


def _point(x: float, runs: Sequence[Run], named: Callable[[Run], str | None], measure: str) -> Point | None:
    found = [run["recoveries"].get(named(run)) for run in runs]
    records = [record for record in found if record and record[measure] is not None]
    return Point(x, interval_of(records, measure), len(records)) if records else None


def merge_sections(runs: Sequence[Run]) -> list[Section]:
    """Recoveries over the share, drawn where it varies."""
    merged = merges(runs)
    varied = [merge for merge in merged if len(merge.students) == 2 and len(merge.over_share("recovery")) > 1]
    drawn = [
        Figure(title, Markup(figures.over_share(varied, measure, title)), _table(merged, measure))
        for measure, title in MEASURES.items()
        if any(merge.over_share(measure) for merge in varied)
    ]
    return [Section("merges", "Students merged", None if drawn else _table(merged, "recovery"), NOTE, drawn)]


def _table(merged: Sequence[Merge], measure: str) -> Table:
    rows = []
    for merge in merged:
        points = [(f"student {point.x + 1:g}", point) for point in merge.ends(measure)]
        points += [("of the rows of all", point) for point in [merge.mixed(measure)] if point]
        points += [(f"merged, t = {point.x:g}", point) for point in merge.over_share(measure)]
        points += merge.others(measure).items()
        rows += [[merge.name, name, *_cells(point)] for name, point in points]
    return {"header": ["students", "model", "recovery", "95 % interval", "seeds"], "rows": rows}


def _cells(point: Point) -> list[str]:
    interval = point.interval
    bounds = f"{percent(interval.low)} to {percent(interval.high)} over {interval.contains}"
    within = ABSENT if interval.contains == "nothing" else bounds
    return [percent(interval.estimate), within, str(point.seeds)]
