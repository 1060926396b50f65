"""What pruned and recovered models are worth as drafts, by arm and lookahead, and how arms differ in that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import mean
from typing import Any

from sddx.report.curves import Run, arms
from sddx.report.sections import Section, Table
from sddx.report.subjects import roles
from sddx.report.table import percent
from sddx.statistics.intervals import t_interval

UNTUNED = "untuned"
NOTE = (
    "Means over seeds, acceptance with its 95 % interval over them. Times are those of the machines that the runs "
    "name; promised is what the acceptance comes to at the cost of a draft's step measured there."
)
PAIRED = "Acceptance in points, on the same prompts and seeds; 95 % over seeds."
Key = tuple[str, str, str, str]  # what tells runs from others, the draft, the prompts, the lookahead


def draft_sections(runs: Sequence[Run]) -> list[Section]:
    """What each draft is worth, and the arms' paired differences to SFT."""
    found = drafts(runs)
    return [
        Section("drafts", "As drafts for the unpruned model", draft_table(found), NOTE),
        Section(
            "draft_differences", "Acceptance of drafts, paired differences to SFT", difference_table(found), PAIRED
        ),
    ]


def drafts(runs: Sequence[Run]) -> dict[Key, dict[int, dict[str, Any]]]:
    """By seed, counts, rates and times of each draft at each lookahead. The pruned model is one draft, whichever
    arm and seed the run had."""
    found: dict[Key, dict[int, dict[str, Any]]] = {}
    for where, arm, group in arms([run for run in runs if run.get("drafts")]):
        for run in group:
            for name, of in run["drafts"].items():
                draft = {"cut": UNTUNED, "student": arm}.get(roles(run)[name], name)
                for prompts, record in of.items():
                    for ahead, each in _each(record):
                        shown = run["choices"]["dataset"] if prompts == "dataset" else prompts
                        seed = run["choices"]["seed"] if draft != UNTUNED else 0
                        found.setdefault((where, draft, shown, ahead), {})[seed] = each
    return found


def _each(record: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    timed = record["measured"]["lookaheads"]
    yield from ((ahead, {**each, **timed[ahead]}) for ahead, each in record["lookaheads"].items())


def draft_table(found: dict[Key, dict[int, dict[str, Any]]]) -> Table:
    """A row for each draft, set of prompts and lookahead."""
    rows = []
    for (where, draft, prompts, ahead), seeds in found.items():
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


def difference_table(found: dict[Key, dict[int, dict[str, Any]]]) -> Table:
    """A row for each trained draft but SFT, beside SFT's of at least two seeds in common."""
    rows = []
    for (where, draft, prompts, ahead), seeds in found.items():
        base = found.get((where, "sft", prompts, ahead), {})
        common = sorted(seeds.keys() & base.keys())
        if draft not in (UNTUNED, "sft") and len(common) > 1:
            pairs = [(seeds[seed]["acceptance"], base[seed]["acceptance"]) for seed in common]
            interval = t_interval([100 * (mine - theirs) for mine, theirs in pairs])
            told = f"{interval.estimate:+.1f} ({interval.low:+.1f} to {interval.high:+.1f})"
            rows.append([where, f"{draft} - sft", prompts, ahead, str(len(common)), told])
    return {"header": ["runs", "drafts", "prompts", "ahead", "seeds", "accepted"], "rows": rows}
