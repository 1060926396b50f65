"""What pruned and recovered models are worth as drafts, by arm and lookahead, and how arms differ in that."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

from sddx.records import OWN_PROMPTS
from sddx.report.agreement import per_unit
from sddx.report.curves import Run, alike, distinction, judged, seed_of
from sddx.report.sections import Section, Table, removed_units, scores_of
from sddx.report.subjects import UNTUNED, roles, shown_as
from sddx.report.table import percent, within
from sddx.statistics.intervals import rank_correlation, t_interval

NOTE = (
    "Means over seeds, acceptance with its 95 % interval over them. Times are those of the machines that the runs "
    "name; promised is what the acceptance comes to at the cost of a draft's step measured there."
)
CHOSEN = ("pruning", "cut_seed", "keep", "oracle")  # the choices that lead to a cut
FEWEST = 8  # points over which a correlation is told
CUTS = (
    "Over cuts drawn at random: the rank correlation of a draft's acceptance, at the smallest lookahead, with "
    "minus the sum of the removed units' scores, 95 % over cuts; 1 where scores order cuts as acceptance does. "
    "Beside it the acceptance of the metric's own cut and the mean of the random ones."
)
PAIRED = "Acceptance in points, on the same prompts and seeds; 95 % over seeds."
Key = tuple[str, str, str, str]  # what tells runs from others, the draft, the prompts, the lookahead


def draft_sections(runs: Sequence[Run]) -> list[Section]:
    """What each draft is worth, and the arms' paired differences to SFT."""
    records = drafts(runs)
    return [
        Section("drafts", "As drafts for the unpruned model", draft_table(records), NOTE),
        Section("draft_cuts", "Which cut makes a good draft", cut_table(runs), CUTS),
        Section(
            "draft_differences",
            "Acceptance of drafts, paired differences to SFT",
            difference_table(records),
            PAIRED,
        ),
    ]


def drafts(runs: Sequence[Run]) -> dict[Key, dict[int, dict[str, Any]]]:
    """By seed, counts, rates and times of each draft at each lookahead. The pruned model is one draft, whichever
    arm and seed the run had."""
    records: dict[Key, dict[int, dict[str, Any]]] = {}
    for where, arm, _, name, group in judged([run for run in runs if run.get("drafts")]):
        for run in (run for run in group if name in run["drafts"]):
            draft, seed = shown_as(run, name, arm), seed_of(run, name)
            for prompts, record in run["drafts"][name].items():
                shown = run["choices"]["dataset"] if prompts == OWN_PROMPTS else prompts
                for ahead, each in _each(record):
                    records.setdefault((where, draft, shown, ahead), {})[seed] = each
    return records


def _each(record: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    timed = record["measured"]["lookaheads"]
    yield from ((ahead, {**each, **timed[ahead]}) for ahead, each in record["lookaheads"].items())


def draft_table(records: dict[Key, dict[int, dict[str, Any]]]) -> Table:
    """A row for each draft, set of prompts and lookahead."""
    rows = []
    for (where, draft, prompts, ahead), seeds in records.items():
        rates = [each["acceptance"] for each in seeds.values() if each["acceptance"] is not None]
        numbers = [
            f"{mean(each[name] for each in seeds.values()):.2f}"
            for name in ("accepted_length", "length", "speed_up", "promised")
        ]
        saved = percent(mean(each["saved"] for each in seeds.values()))
        count = "-" if draft == UNTUNED else str(len(seeds))
        accepted, spread = percent(mean(rates)) if rates else "-", _spread(rates)
        rows.append([where, draft, prompts, ahead, count, accepted + spread, *numbers[:2], saved, *numbers[2:]])
    header = ["runs", "draft", "prompts", "ahead", "seeds", "accepted", "a pass", "with own", "passes saved"]
    return {"header": [*header, "times as fast", "promised"], "rows": rows}


def _spread(shares: Sequence[float]) -> str:
    if len(shares) < 2:
        return ""
    interval = t_interval([100 * share for share in shares])
    return f" ({interval.low:.1f} to {interval.high:.1f})"


def difference_table(records: dict[Key, dict[int, dict[str, Any]]]) -> Table:
    """A row for each trained draft but SFT, beside SFT's of at least two seeds in common."""
    rows = []
    for (where, draft, prompts, ahead), seeds in records.items():
        base = records.get((where, "sft", prompts, ahead), {})
        common = sorted(seeds.keys() & base.keys())
        if draft not in (UNTUNED, "sft") and len(common) > 1:
            pairs = [(seeds[seed]["acceptance"], base[seed]["acceptance"]) for seed in common]
            interval = t_interval([100 * (mine - theirs) for mine, theirs in pairs])
            rows.append([where, f"{draft} - sft", prompts, ahead, str(len(common)), within(interval, "+.1f")])
    return {"header": ["runs", "drafts", "prompts", "ahead", "seeds", "accepted"], "rows": rows}


def cut_table(runs: Sequence[Run]) -> Table:
    """A row for each draft and each metric whose scores are known, where enough random cuts remove as much and all
    else is equal but for the arm and the seed."""
    groups = alike([run for run in runs if run.get("drafts")], "loss", "seed", *CHOSEN)
    rows = [
        [distinction(key, list(groups)) or f"{group[0]['choices']['removed']:g} removed", draft, metric, *cells]
        for key, group in groups.items()
        for draft, cuts in _by_cut(group).items()
        for metric, cells in _correlations(group, cuts)
    ]
    return {"header": ["cuts", "draft", "metric", "random cuts", "correlation", "own cut", "random"], "rows": rows}


Cuts = dict[str, dict[tuple[int, ...], list[float]]]  # acceptances by rule and by the units that are gone


def _by_cut(runs: Sequence[Run]) -> dict[str, Cuts]:
    """The acceptances of each draft at the smallest lookahead, of runs that differ in cut and seed."""
    acceptances: dict[str, Cuts] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for run in runs:
        for name in (name for name in run["drafts"] if roles(run)[name] in ("cut", "student")):
            draft = shown_as(run, name, run["choices"]["loss"])
            tried = run["drafts"][name][OWN_PROMPTS]["lookaheads"]
            accepted = tried[min(tried, key=int)]["acceptance"]
            if accepted is not None:
                acceptances[draft][run["choices"]["pruning"]][removed_units(run)].append(accepted)
    return acceptances


def _correlations(
    runs: Sequence[Run], cuts: Mapping[str, Mapping[tuple[int, ...], list[float]]]
) -> Iterator[tuple[str, list[str]]]:
    """Of each metric that a cut was chosen by, what its scores say of random ones."""
    drawn = {cut: mean(each) for cut, each in cuts.get("random", {}).items()}
    if len(drawn) < FEWEST:
        return
    for metric, run in {run["choices"]["pruning"]: run for run in runs if "score" in run["artifacts"]}.items():
        if (scores := scores_of(run)) and metric in cuts:
            values = per_unit(scores["mean"])
            correlation = rank_correlation(
                [-sum(values[unit] for unit in cut) for cut in drawn], list(drawn.values())
            )
            own = mean(accepted for each in cuts[metric].values() for accepted in each)
            yield metric, [str(len(drawn)), within(correlation, ".2f"), percent(own), percent(mean(drawn.values()))]
