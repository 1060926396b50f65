"""The table at the end of a run, for the terminal and as Markdown, from the fields of `summary.json`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sddx.records import OWN_PROMPTS, Rewrite
from sddx.report.extraction import Reading, named, read_variously, readings
from sddx.report.subjects import reference, roles

ABSENT = "-"
APART = "(apart): in no average and no recovery"
CHOOSING = "selection items: for choosing, not for reporting"


def rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row per task and one for the average: name, the models' scores in percent with their standard errors, and
    the last of them / unpruned in percent. A task that was trained on carries an asterisk, and what stands apart
    says so."""
    scores = summary["scores"]
    tasks = [task for task in scores[reference(summary)] if task != "average"]
    return [_row(summary, task) for task in [*tasks, "average"]]


def _row(summary: Mapping[str, Any], task: str) -> tuple[str, ...]:
    models = list(roles(summary))
    scores = [summary["scores"][model].get(task) for model in models]
    errors = [summary["standard_errors"].get(model, {}).get(task) for model in models]
    name = marked(task, summary.get("trained", ()), summary.get("apart", ()))
    unpruned, left = scores[0], scores[-1]
    share = left / unpruned if left is not None and unpruned else None
    chance = summary.get("chance", {}).get(task)
    return (name, ABSENT if chance is None else f"{100 * chance:.0f}", *map(_score, scores, errors), percent(share))


def marked(task: str, trained: Collection[str], apart: Collection[str]) -> str:
    """A task's name with what must be known of it."""
    return task + (" *" if task in trained else "") + (" (apart)" if task in apart else "")


def _score(score: float | None, error: float | None) -> str:
    if score is None:
        return ABSENT
    return f"{100 * score:.1f} ± " + (ABSENT if error is None else f"{100 * error:.1f}")


def within(interval: Any, form: str) -> str:
    """An estimate with its interval, each in this form."""
    return f"{interval.estimate:{form}} ({interval.low:{form}} to {interval.high:{form}})"


def percent(share: float | None) -> str:
    """A share as percent with one decimal, or a dash where it is not defined."""
    return ABSENT if share is None else f"{100 * share:.1f} %"


def header(summary: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the columns. What a pruned model keeps is no recovery."""
    models = roles(summary)
    return ("task", "chance", *models, "kept" if list(models.values())[-1] == "cut" else "recovery")


def lines(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What stands under the table, as (label, text): the recoveries and what the run cost."""
    seconds = summary.get("seconds") or {}
    pairs = [
        ("gap closed", percent(summary.get("gap_closed"))),
        ("recovery", _with_interval(summary)),
        ("recovery, pruned model", percent(summary.get("pruned_recovery"))),
        ("recovery, skills trained on", percent(summary.get("recovery_trained"))),
        ("recovery, held-out skills", percent(summary.get("recovery_held_out"))),
        ("recovery above chance", percent(summary.get("recovery_above_chance"))),
        ("bits per byte, right answers", likelihood(summary, "bits_per_byte")),
        ("margin, right answers", likelihood(summary, "margin")),
        ("KL(unpruned || model)", _text(summary, "kl", "{:.3f}", " nats a token on held-out text")),
        ("perplexity", _text(summary, "perplexity", "{:,.2f}", " on held-out text")),
        ("repeated 4-grams", _text(summary, "repetition", "{:.1%}", "")),
        ("words in an answer", _text(summary, "mean_length", "{:.1f}", "")),
        *_readings(summary),
        ("requests cut to the context", _cut(summary.get("requests_cut") or {})),
        ("overlap with training rows", _overlap(summary)),
        ("refused answers", percent(summary.get("fallback_share"))),
        ("answers of its own", _written(summary.get("written"))),
        ("surprise by them", _surprise(summary.get("written"))),
        ("captured of the teacher", _captured(summary.get("captured"))),
        ("training", _training(summary, seconds.get("train"))),
        ("training, rows of all", _training(summary.get("mixed"), seconds.get("train_mixed"))),
        ("rollouts", _rollouts(summary.get("rollouts"))),
        ("parameters", _parameters(summary.get("parameters"))),
        ("left", summary.get("depth") or ABSENT),
        ("cache, bytes a token", _parameters(summary.get("cache_bytes"))),
        ("update left unexplained by", _shares(summary.get("patch_unexplained") or {})),
        ("merged", _ways((summary.get("merged") or {}).get("ways", {}))),
        ("merged by block", _searched(summary.get("searched"))),
        *_drafts(summary.get("drafts") or {}),
        ("drafts were timed on", _timed(summary.get("drafts") or {})),
        *_drift(summary.get("drift") or {}),
        ("seconds", _stages(seconds)),
    ]
    return [(label, text) for label, text in pairs if text != ABSENT]


def _captured(captured: Mapping[str, Any] | None) -> str:
    """How much of its probability the tokens hold that are kept of it."""
    if not captured:
        return ABSENT
    mass, sure = percent(captured["mass"]), percent(captured["sure"])
    return f"{mass} of its probability in {captured['k']} tokens, above 99 % at {sure} of answer tokens"


def _ways(tensors: Mapping[str, int]) -> str:
    """How many tensors of a merged model took which way."""
    words = {"arc": "along an arc", "line": "along a line", "parent": "as one student has them"}
    counted = ", ".join(f"{n} {words.get(way, way)}" for way, n in tensors.items())
    return f"{counted} (tensors)" if counted else ABSENT


def _searched(search: Mapping[str, Any] | None) -> str:
    """The shares of the second student that a search chose, and what it chose by."""
    if not search:
        return ABSENT
    shares = " ".join(f"{share:.2g}" for share in search["shares"])
    return (
        f"shares of the second student {shares}: {percent(search['score'])} on selection items, the plain merge "
        f"{percent(search['plain'])}, best of {len(search['candidates'])}"
    )


def _drafts(drafts: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What each draft is worth at each lookahead, on each set of prompts; times are of the machine that is
    named."""
    return [
        (f"draft {model}, {ahead} ahead" + (f", {name}" if name != OWN_PROMPTS else ""), _draft(record, ahead))
        for model, of in drafts.items()
        for name, record in of.items()
        for ahead in record["lookaheads"]
    ]


def _draft(record: Mapping[str, Any], ahead: str) -> str:
    rates, timed = record["lookaheads"][ahead], record["measured"]["lookaheads"][ahead]
    accepted, saved, same = percent(rates["acceptance"]), percent(rates["saved"]), rates.get("same_texts")
    texts = "" if same is None else f", {same} of {record['prompts']} texts as by plain decoding"
    return (
        f"{accepted} accepted, {rates['accepted_length']:.2f} a pass ({rates['length']:.2f} with the target's "
        f"own), {saved} of passes saved, {timed['speed_up']:.2f} times as fast (promised {timed['promised']:.2f})"
        f"{texts}"
    )


def _timed(drafts: Mapping[str, Mapping[str, Any]]) -> str:
    """The machines on which drafts were timed, and what both models take in one set of weights."""
    records = [record for of in drafts.values() for record in of.values()]
    places = {f"{each['measured']['device']} (threads: {each['measured']['threads']})" for each in records}
    shares = [each["bytes"]["one_copy"] / each["bytes"]["plain"] for each in records]
    held = f"; {max(shares):.2f} times the memory of plain decoding" if records else ""
    return ", ".join(sorted(places)) + held if records else ABSENT


def _drift(drifts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How far each model moved: divergences, surprise by the data, the block that is least like itself."""
    return [
        line
        for model, record in drifts.items()
        for line in (
            (f"drift, {model}", _moved(record["kl"])),
            (f"surprise by the data, {model}", _by_data(record["surprise"])),
            (f"blocks alike, {model}", _alike(record["similarity"])),
            (f"pass@k, {model}", _passes(record.get("passes"))),
        )
    ]


def _moved(kl: Mapping[str, Any]) -> str:
    """Divergences by where they were taken, and how much of the first a few tokens have."""
    known = {name: each["nats"] for name, each in kl.items() if each["nats"] is not None}
    shown = ", ".join(f"{nats:.3f} on {name}" for name, nats in known.items())
    return f"KL(unpruned || model) {shown} nats a token; of that on prompts {percent(kl['prompts']['top'])} in 20 %"


def _by_data(surprise: Mapping[str, Any]) -> str:
    """Of the answers that are learned, and of references."""
    if "learned" not in surprise["model"]:
        return ABSENT
    losses = [surprise[side][kind]["nats"] for side in ("model", "unpruned") for kind in ("learned", "reference")]
    if None in losses:
        return ABSENT
    mine, reference, whole, its_reference = (f"{loss:.2f}" for loss in losses)
    return f"{mine} (references {reference}), unpruned {whole} (references {its_reference}) nats a token, held out"


def _alike(similarity: Mapping[str, Any]) -> str:
    blocks = similarity["blocks"]
    least = min(blocks, key=blocks.get) if blocks else ""
    return f"CKA {min(blocks.values()):.3f} at the least, block {least}" if blocks else ABSENT


def _passes(passes: Mapping[str, Any] | None) -> str:
    """Of the model and of the unpruned one."""
    shown = {side: ", ".join(percent(share) for share in of.values()) for side, of in (passes or {}).items()}
    return f"{shown['model']} (unpruned {shown['unpruned']}) at {', '.join(passes['model'])}" if passes else ABSENT


def likelihood(summary: Mapping[str, Any], measure: str, task: str = "average") -> str:
    """What each model has of a measure of likelihood, with its difference to the unpruned one."""
    values = {model: of.get(measure, {}).get(task) for model, of in summary.get("likelihoods", {}).items()}
    known = {model: value for model, value in values.items() if value is not None}
    first = next(iter(known), "")  # the reference
    shown = [f"{m} {v:.3f}" + (f" ({v - known[first]:+.3f})" if m != first else "") for m, v in known.items()]
    return ", ".join(shown) + (" nats" if measure == "margin" else "") if shown else ABSENT


def _text(summary: Mapping[str, Any], measure: str, form: str, unit: str) -> str:
    """One measure of the text itself for each model that has it."""
    values = {model: text.get(measure) for model, text in summary.get("text", {}).items()}
    shown = [f"{model} {form.format(value)}" for model, value in values.items() if value is not None]
    return ", ".join(shown) + unit if shown else ABSENT


def _readings(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Each model's score under each filter that reads a task's answers, and the share that the filter could not."""
    by_model = readings(summary, read_variously([summary]))
    keys = dict.fromkeys(key for read in by_model.values() for key in read)
    return [
        (
            f"{key[0]}, {named(summary, key)}",
            ", ".join(f"{model} {_reading(read[key])}" for model, read in by_model.items() if key in read),
        )
        for key in keys
    ]


def _cut(requests: Mapping[str, int]) -> str:
    return ", ".join(f"{task} {count:,}" for task, count in requests.items()) or ABSENT


def _reading(reading: Reading) -> str:
    share = "" if reading.unparsed is None else f" ({percent(reading.unparsed)} unparsed)"
    return percent(reading.score) + share


def _overlap(summary: Mapping[str, Any]) -> str:
    """The share of items that share a run of words with a training row, of each task (with its parts) that has
    any."""
    if not (overlap := summary.get("overlap")):
        return ABSENT
    items, hits = Counter[str](), Counter[str]()
    for task, record in overlap["tasks"].items():
        name = summary.get("part_of", {}).get(task, task)
        items[name] += record["items"]
        hits[name] += record["overlapping"]
    shown = [f"{name} {percent(count / items[name])}" for name, count in hits.items() if count]
    return (", ".join(shown) or "none") + f" of evaluation items ({overlap['words']} words in a row)"


def _written(written: Mapping[str, Any] | None) -> str:
    """How the answers compare with their references."""
    if not written or written["rouge_l"] is None:
        return ABSENT
    words = " and ".join(f"{written['words'][name]:.0f} ({name})" for name in ("self", "reference"))
    shares = f"copied {percent(written['copied'])}, cut off {percent(written['cut_off'])}"
    return f"{shares}, ROUGE-L {written['rouge_l']:.2f} to the references, {words} words"


def _surprise(written: Mapping[str, Any] | None) -> str:
    """The models' cross-entropy on references and on answers of the unpruned model's own."""
    if not written or not written["sample"]:
        return ABSENT
    shown = (
        f"{model} {losses['self']:.2f} (reference {losses['reference']:.2f})"
        for model, losses in written["surprise"].items()
    )
    return ", ".join(shown) + f" nats a token, {written['sample']} rows"


def _with_interval(summary: Mapping[str, Any]) -> str:
    low, high = summary.get("recovery_low"), summary.get("recovery_high")
    if summary.get("recovery") is None or low is None or high is None:
        return ABSENT
    contains = summary.get("recovery_contains", "items")
    bounds = f"{100 * low:.1f} to {100 * high:.1f}"
    return f"{percent(summary['recovery'])} (95 % interval over {contains}: {bounds})"


def _training(trained: Mapping[str, Any] | None, seconds: float | None) -> str:
    if not trained or trained.get("steps") == 0:
        return ABSENT
    costs = [("examples", "examples"), ("supervised_tokens", "supervised tokens"), ("steps", "steps")]
    known = [f"{trained[name]:,} {words}" for name, words in costs if trained.get(name) is not None]
    known += [f"{dropped:,} rows dropped as too long"] if (dropped := trained.get("dropped_rows")) else []
    return ", ".join(known + ([f"{seconds:.0f} s"] if seconds is not None else [])) or ABSENT


def _rollouts(rollouts: Mapping[str, Any] | None) -> str:
    """What the student wrote in its training, and how long that took."""
    if not rollouts or not (rows := rollouts["rows"]):
        return ABSENT
    amounts = f"{rollouts['tokens']:,} tokens written in {rows:,} rows, {rollouts['seconds']:.0f} s of the training"
    ended, repeating = (percent(rollouts[name] / rows) for name in ("ended", "repeating"))
    return f"{amounts}; {ended} ended, {repeating} repeating"


def _parameters(parameters: Mapping[str, int] | None) -> str:
    if parameters is None:
        return ABSENT
    return ", ".join(f"{name} {count:,}" for name, count in parameters.items())


def _shares(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {percent(share)}" for name, share in shares.items()) or ABSENT


def _stages(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{stage} {spent:.1f}" for stage, spent in seconds.items()) or ABSENT


def show(summary: Mapping[str, Any], console: Console) -> None:
    """Print the table and the lines under it."""
    table = Table(title=_title(summary), title_justify="left")
    for column in header(summary):
        table.add_column(column, justify="left" if column == "task" else "right", no_wrap=True)
    cells = rows(summary)
    for row in cells[:-1]:
        table.add_row(*row)
    table.add_section()
    table.add_row(*cells[-1], style="bold")
    console.print(table)
    if summary.get("trained"):
        console.print("* trained on", style="dim")
    if summary.get("apart"):
        console.print(APART, style="dim")
    for label, text in lines(summary):
        console.print(f"{label + ':':<29} {text}", highlight=False, soft_wrap=True)


def _title(summary: Mapping[str, Any]) -> str:
    named = f", {summary['name']}" if summary.get("name") else ""
    notes = [f"unpruned: dequantised {kind}"] if (kind := summary.get("dequantised")) else []
    notes += [CHOOSING] if is_choosing(summary) else []
    return f"Scores in percent ± standard error{named}" + (f" ({'; '.join(notes)})" if notes else "")


def is_choosing(summary: Mapping[str, Any]) -> bool:
    """Whether a run was evaluated on selection items, or on another split of the data than a task's own."""
    tasks: Mapping[str, Any] = next(iter(summary.get("scores", {}).values()), {})
    choices = summary.get("choices", {})
    of_side = choices.get("side") == "selection"
    return of_side or bool(choices.get("split")) or any(task.endswith("_selection") for task in tasks)


def markdown(summary: Mapping[str, Any]) -> str:
    """The same table and lines as Markdown, for `table.md`."""
    parts = [
        f"{_title(summary)}.",
        "",
        grid(header(summary), rows(summary)),
        "",
        *(["\\* trained on", ""] if summary.get("trained") else []),
        *([APART, ""] if summary.get("apart") else []),
        *(f"- {label}: {text}" for label, text in lines(summary)),
    ]
    return "\n".join(parts) + "\n"


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left and all others to the right."""
    ruler = "|---" + "|---:" * (len(header) - 1) + "|"
    line, *others = ("| " + " | ".join(map(_escape, cells)) + " |" for cells in (header, *rows))
    return "\n".join([line, ruler, *others])


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|").replace("*", "\\*").replace("_", "\\_").replace("\n", " ")


def acceptance(rewrites: Sequence[Rewrite], console: Console, *, shown: int = 2) -> None:
    """Print how many of the model's answers were accepted and why others were refused, then the first few of
    both kinds beside their references."""
    table = Table(title="Self-written answers", title_justify="left")
    table.add_column("outcome")
    table.add_column("examples", justify="right")
    table.add_column("share", justify="right")
    for outcome, count in Counter(map(_outcome, rewrites)).most_common():
        table.add_row(escape(outcome), f"{count:,}", percent(count / len(rewrites)))
    console.print(table)
    accepted = [rewrite for rewrite in rewrites if not rewrite.reason][:shown]
    refused = [rewrite for rewrite in rewrites if rewrite.reason][:shown]
    for rewrite in [*accepted, *refused]:
        console.print(_outcome(rewrite), style="bold", markup=False, highlight=False)
        console.print(_quoted(rewrite), markup=False, highlight=False, soft_wrap=True)


def _outcome(rewrite: Rewrite) -> str:
    return f"refused: {rewrite.reason}" if rewrite.reason else "accepted"


def _quoted(rewrite: Rewrite) -> str:
    texts = (("prompt", rewrite.prompt), ("reference", rewrite.reference), ("answer", rewrite.answer))
    return "\n".join(f"  {label}: " + text.replace("\n", "\n    ") for label, text in texts)
