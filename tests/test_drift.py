"""Laws of drift: what is said of how far a model moved is so, and no cut is no drift."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composing import SMALL, composed, resolve
from stored import artifact

import sddx
from sddx.compression.compressed import compress
from sddx.compression.remove import Removal
from sddx.data.checkers import Reason
from sddx.data.encode import Encoded, collate
from sddx.data.selfdata import TOO_LONG, Answer
from sddx.drift.measure import FEWEST, Drift, Material, similarity
from sddx.drift.passes import pass_at
from sddx.drift.reading import Reading, surprise
from sddx.drift.similarity import cka, concentration
from sddx.errors import UserError, mistakes_of, require_none
from sddx.evaluation.text import attended, divergences, labelled
from sddx.models.load import load_model, load_tokenizer
from sddx.records import Artifact, Cut, Example, Rewrite
from sddx.report import drift as report_drift
from sddx.report import page, summary, table
from sddx.stages.cost import estimated
from sddx.stages.drift import check as drift_check
from sddx.students.teacher import SeparateTeacher, SharedTeacher, beside
from sddx.tiny import data
from sddx.train import look, run, verify

CHECKPOINT = Path(sddx.__file__).parent / "tiny" / "checkpoint"
CUT = Cut.without({3, 8}, 12)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_kernels(x: torch.Tensor, y: torch.Tensor) -> float:
    """Debiased CKA by its definition, on kernels of tokens by tokens that are U-centred (Szekely and Rizzo)."""

    def centred(kernel: torch.Tensor) -> torch.Tensor:
        n = len(kernel)
        kernel = kernel - torch.diag(kernel.diagonal())
        rows = kernel.sum(0) / (n - 2)
        found = kernel - rows[:, None] - rows[None] + kernel.sum() / ((n - 1) * (n - 2))
        return found - torch.diag(found.diagonal())

    k, l = (centred(each @ each.T) for each in (x, y))  # noqa: E741
    return float((k * l).sum() / ((k * k).sum() * (l * l).sum()).sqrt())


def test_a_representation_is_like_itself_turned_scaled_and_moved() -> None:
    x = draw(200, 6)
    turn, _ = torch.linalg.qr(draw(6, 6, seed=1))
    assert cka(x, x) == pytest.approx(1.0, abs=1e-12)
    assert cka(x, 3 * x @ turn + 1e4) == pytest.approx(1.0, abs=1e-6)


def test_independent_representations_are_unlike() -> None:
    """On average 0, where the biased estimate is far from it: 40 tokens of 60 channels."""
    found = [cka(draw(40, 60, seed=seed), draw(40, 60, seed=seed + 1000)) for seed in range(60)]
    error = torch.tensor(found).std().item() / math.sqrt(len(found))
    assert abs(sum(found) / len(found)) < 4 * error < 0.05
    x, y = (each - each.mean(0) for each in (draw(40, 60), draw(40, 60, seed=1)))
    biased = (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    assert biased > 0.5


@pytest.mark.parametrize(("tokens", "widths"), [(5, (3, 3)), (30, (50, 4)), (300, (7, 11))])
def test_cka_is_that_of_its_definition(tokens: int, widths: tuple[int, int]) -> None:
    x, z = draw(tokens, widths[0]), draw(tokens, widths[1], seed=1)
    y = z + 0.5 * x[:, :1] + 3  # in part the same
    assert cka(x, y) == pytest.approx(by_kernels(x, y), abs=1e-9)
    assert cka(x.float(), y.float()) == pytest.approx(cka(x, y), abs=1e-5)


def test_cka_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="four tokens or more"):
        cka(draw(3, 2), draw(3, 2))
    with pytest.raises(ValueError, match="four tokens or more"):
        cka(draw(5, 2), draw(6, 2))
    with pytest.raises(ValueError, match="one point"):
        cka(torch.ones(9, 2), draw(9, 2))


def test_how_much_a_few_tokens_have() -> None:
    """By hand: alike, all in one, rounding dust below 0, a share that is no whole number of tokens."""
    assert concentration(torch.ones(10)) == pytest.approx(0.2)
    assert concentration(torch.tensor([0.0, 0, 0, 0, 2])) == 1.0
    assert concentration(torch.tensor([1.0, 3, -1e-9, 2])) == 0.5
    assert concentration(torch.arange(1.0, 7)) == pytest.approx(11 / 21)
    assert concentration(torch.zeros(4)) is None and concentration(torch.zeros(0)) is None


@pytest.mark.parametrize(("k", "right", "answers"), [(1, 3, 8), (4, 3, 8), (4, 0, 8), (3, 6, 7), (2, 4, 4)])
def test_pass_at_k_is_that_of_every_draw(k: int, right: int, answers: int) -> None:
    """By enumeration of all draws of k answers."""
    draws = list(combinations([True] * right + [False] * (answers - right), k))
    assert pass_at(k, right, answers) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_is_unbiased() -> None:
    """Over all that n answers can come to, each as likely as it is, it is the chance of k new ones."""
    share, answers = 0.3, 10
    for k in (1, 4, 5):
        odds = [math.comb(answers, right) * share**right * (1 - share) ** (answers - right) for right in range(11)]
        expected = sum(odd * pass_at(k, right, answers) for right, odd in enumerate(odds))
        assert expected == pytest.approx(1 - (1 - share) ** k)
    with pytest.raises(ValueError, match="pass@6 needs 12 answers or more, not 10"):
        pass_at(6, 3, 10)


def routes(cut: Cut = CUT) -> tuple[Any, Any]:
    """The embedded model and what a cut leaves of it, in one set of weights."""
    made = compress(load_model(CHECKPOINT).requires_grad_(False), [Removal(cut)])
    return beside(SharedTeacher(made)), made.model


def material(size: int = 6, written: bool = False) -> Material:
    how: dict[str, Any] = {"shift": 1.0, "seed": 0, "check": None, "rewrite": "tiny", "trains": []}
    rows = data.dataset(skill="arithmetic", size=size, **how).examples
    own = [Rewrite(row.id, row.prompt, row.response, row.response[::-1], "") for row in rows] if written else []
    return Material(rows, rows, own, data.conversations(split="text", size=24, seed=1))


def reading(**given: Any) -> Reading:
    how: dict[str, Any] = {"max_length": 512, "context": 512, "batch_size": 4, "device": "cpu"}
    return Reading(load_tokenizer(CHECKPOINT), **{**how, **given})


def measured(cut: Cut, given: Material, **settings: Any) -> dict[str, Any]:
    how: dict[str, Any] = {"size": 6, "max_new_tokens": 24, "batch_size": 4, "temperature": 0.0, "seed": 0}
    unpruned, model = routes(cut)
    return Drift(**{**how, **settings})(unpruned, model, cut.kept, given, reading())


@pytest.mark.parametrize(("written", "apart"), [(False, 1), (True, 2)])
def test_progress_ends_where_it_was_said_to(written: bool, apart: int) -> None:
    """And answers that are the same, as references and those that are learned are here, are read once."""
    seen: list[int] = []
    given = material(written=written)
    drift = Drift(size=6, max_new_tokens=8, batch_size=4, temperature=0.0, seed=0)
    found = drift(*routes(CUT), CUT.kept, given, reading(progress=seen.append))
    assert len({*given.apart.values()}) == apart
    assert drift.steps(given) == 6 * (4 + 2 * apart) + 2 * 24
    assert sum(seen) == drift.steps(given) - 24  # blocks are compared over one batch, which nobody goes on from
    for judged in found["surprise"].values():
        assert judged["learned"] == judged["reference"] == judged.get("replaced", judged["reference"])
        assert judged.get("self", {}) != judged["reference"]


def test_divergence_by_token_is_torchs() -> None:
    """At the places asked for, in their order, whatever the chunk; 0 of a model to itself."""
    unpruned, model = routes()
    rows = [Encoded("", [5, 9, 7, 6, 8], [-100, -100, 6, 8, -100], 2), Encoded("", [4, 3], [3, -100], 1)]
    batch = collate(rows, 0)
    with torch.no_grad():
        p, q = (
            each(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            for each in (unpruned, model)
        )
        kl = torch.nn.functional.kl_div(
            q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none"
        ).sum(-1)
    teacher = SeparateTeacher(unpruned)
    for places, chunk in ((attended, 2), (labelled, 2), (labelled, 512)):
        found = divergences(teacher, model, [batch, batch], places, chunk=chunk)
        expected = kl[places(batch)].double()
        torch.testing.assert_close(found, torch.cat([expected, expected]), atol=1e-5, rtol=1e-4)
    assert divergences(teacher, unpruned, [batch]).abs().max() == 0
    assert len(divergences(teacher, unpruned, [])) == 0


def test_bits_per_byte_are_a_sum_over_a_sum() -> None:
    """By torch, answer by answer, end tokens in the bits and not in the bytes; None where a row is cut off."""
    model, rows, read = load_model(CHECKPOINT), material().rows, reading()
    nats, tokens = 0.0, 0
    for row in read.encoded(rows):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0]
        loss = torch.nn.functional.cross_entropy(
            logits, torch.tensor(row.labels), ignore_index=-100, reduction="sum"
        )
        nats, tokens = nats + float(loss), tokens + row.supervised
    size = sum(len(row.response.encode()) for row in rows)
    found = surprise(model, rows, read)
    assert found["nats"] == pytest.approx(nats / tokens, rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)
    longest = max(len(row.input_ids) for row in read.encoded(rows))
    cut = surprise(model, rows, reading(max_length=longest - 1))
    assert cut["bits_per_byte"] is None and cut["nats"] is not None
    assert surprise(model, rows, reading(max_length=2)) == {"nats": None, "bits_per_byte": None}


def test_a_cut_of_nothing_is_no_drift() -> None:
    found = measured(Cut.without(set(), 12), material(written=True))
    assert {name: each["nats"] for name, each in found["kl"].items()} == dict.fromkeys(found["kl"], 0.0)
    assert {each["top"] for each in found["kl"].values()} == {None}
    assert found["surprise"]["model"] == found["surprise"]["unpruned"]
    assert list(found["similarity"]["blocks"]) == [str(block) for block in range(12)]
    assert list(found["similarity"]["blocks"].values()) == pytest.approx([1.0] * 12)


def test_a_cut_moves_what_stands_behind_it() -> None:
    """Blocks before it are what they were; tokens add up, and reversed answers are a surprise."""
    given = material(written=True)
    found = measured(CUT, given)
    alike = {int(block): value for block, value in found["similarity"]["blocks"].items()}
    assert list(alike) == list(CUT.kept)
    assert [alike[block] for block in (0, 1, 2)] == pytest.approx([1.0] * 3)
    assert max(alike[block] for block in CUT.kept if block > 3) < 0.999
    read = reading()
    assert found["kl"]["references"]["tokens"] == sum(row.supervised for row in read.encoded(given.rows))
    assert found["kl"]["prompts"]["tokens"] == sum(int(b.attention_mask.sum()) for b in read.prompts(given.rows))
    assert all(each["nats"] > 0 and each["top"] > 0.2 for each in found["kl"].values())
    whole = found["surprise"]["unpruned"]
    assert whole["self"]["nats"] > 2 * whole["replaced"]["nats"] and whole["replaced"] == whole["reference"]
    assert found["answers"]["answers"] == 6 and found["answers"]["mean_length"] > 0


def test_own_samples_are_greedy_or_drawn() -> None:
    given = material()
    plain = measured(CUT, given)
    assert measured(CUT, given) == plain
    drawn = measured(CUT, given, temperature=1.0)
    assert drawn["kl"]["samples"] != plain["kl"]["samples"] and drawn["kl"]["text"] == plain["kl"]["text"]
    assert drawn == measured(CUT, given, temperature=1.0) != measured(CUT, given, temperature=1.0, seed=1)


def test_more_answers_find_more() -> None:
    """By the check, of whole answers; 16 is left out where there are fewer than 32, and no cut costs nothing."""
    rows = material(4)
    given = replace(rows, check=lambda answer, reference: Reason("no") if not answer[-2:-1].isdigit() else True)
    how = {"temperature": 1.0, "samples": 8, "size": 4}
    found = measured(CUT, given, **how)["passes"]
    assert list(found["model"]) == list(found["unpruned"]) == ["1", "4"]
    assert found["unpruned"]["1"] >= found["model"]["1"] and found["model"]["4"] >= found["model"]["1"]
    none = measured(CUT, replace(rows, check=lambda answer, reference: Reason("no")), **how)["passes"]
    assert none["model"] == {"1": 0.0, "4": 0.0}
    same = measured(Cut.without(set(), 12), given, **how)["passes"]
    assert same["model"] == same["unpruned"] and "passes" not in measured(CUT, given)


def test_few_tokens_do_not_tell_how_alike_blocks_are(caplog: pytest.LogCaptureFixture) -> None:
    unpruned, model = routes()
    texts = data.conversations(split="text", size=4, seed=1)
    found = similarity(unpruned, model, CUT.kept, reading().texts(texts))
    assert found["blocks"] == {} and 0 < found["tokens"] < FEWEST * found["channels"]
    assert "CKA is left out" in caplog.text


def test_first_tokens_are_left_out() -> None:
    """Of every text, and padding."""
    unpruned, model = routes()
    texts = data.conversations(split="text", size=3, seed=1)
    batches = list(reading().texts(texts))
    tokens = sum(int(batch.attention_mask.sum()) - len(batch.input_ids) for batch in batches)
    assert similarity(unpruned, model, CUT.kept, batches)["tokens"] == tokens


def test_seeds_share_no_answer_and_prompts_without_room_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def written(self: Drift, model: Any, rows: Any, reading: Any, seed: int) -> list[Answer]:
        seen.append(seed)
        return [Answer("right"), Answer("wrong"), Answer("", TOO_LONG)]

    monkeypatch.setattr(Drift, "_written", written)
    rows = [Example(name, "asked", "right") for name in "abc"]
    material: Any = Material(rows, rows, [], [], check=lambda answer, reference: answer == reference)
    how: dict[str, Any] = {"size": 3, "max_new_tokens": 4, "batch_size": 2, "temperature": 1.0, "samples": 4}
    found = [Drift(**how, seed=seed)._passes(None, material, None) for seed in (0, 1)]  # type: ignore
    assert found == [{"1": 0.5}, {"1": 0.5}] and sorted(seen) == [*range(8)]


def test_nothing_is_said_of_learned_rows_where_the_student_wrote_them(tmp_path: Path) -> None:
    """They are not those of the data set, whose surprise stands under references."""
    kinds = {"learned": {"nats": 2.0}, "reference": {"nats": 2.0}}
    both = json.dumps({"surprise": {"unpruned": kinds, "model": kinds}})
    moved = Artifact("drift", "0" * 64, artifact(tmp_path, "drift", files={"drift.json": both}))
    for rollouts, left in ((None, ["learned", "reference"]), ({"rows": 3}, ["reference"])):
        files = {"training.json": json.dumps({"rollouts": rollouts})}
        student = artifact(tmp_path, "train", str(len(left)) * 64, files)
        found: Any = SimpleNamespace(drifted={"recovered": moved}, student=Artifact("train", "key", student))
        assert [*summary._drift(found)["recovered"]["surprise"]["model"]] == left
        assert (table._by_data(summary._drift(found)["recovered"]["surprise"]) == table.ABSENT) is bool(rollouts)


DRIFTED = (*SMALL, "+drift=full", "drift.size=8", "drift.max_new_tokens=24", "text.size=16")


def settings(*given: str) -> dict[str, Any]:
    with composed(*given) as cfg:
        return resolve(cfg)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            ["drift.size=9"],
            r"drift.size=9 rows .* validation=8 holds out fewer. Use validation=9",
        ),
        (["drift.max_new_tokens=2000"], "No held-out prompt leaves room for 2000 tokens in the model's context"),
        (["drift.temperature=-1"], "drift.temperature=-1 must be 0 or more"),
        (["drift.samples=1"], "pass@1 takes two answers"),
        (["drift.samples=8"], "at drift.temperature=0 all are the same. Use drift.temperature=1"),
        (
            ["drift.samples=8", "drift.temperature=1", "dataset.check._target_=sddx.data.checkers.none"],
            r"right or wrong by dataset.check, and that of this data set \(sddx.data.checkers.none\) does not tell",
        ),
        (["drift._target_=sddx.speculation.measure.Drafts"], "drift"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_work(given: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        verify(settings(*DRIFTED, *given))


def test_drift_in_shards_is_refused() -> None:
    config = settings(*DRIFTED)
    config["trainer"] = {**config["trainer"], "strategy": "fsdp"}
    with pytest.raises(UserError, match="on one device that holds the model whole"):
        require_none(mistakes_of(drift_check.of_settings(config)))


def test_a_run_says_how_far_its_models_moved(tmp_path: Path) -> None:
    """The pruned and the recovered one, the same on text as the evaluation; without training the pruned one alone,
    which another arm on references has in common."""
    asked = (*DRIFTED, f"store={tmp_path / 'store'}")
    summary = json.loads(run(settings(*asked, "loss=sdd"), tmp_path / "one").read_text())
    assert list(summary["drift"]) == ["pruned", "recovered"]
    for name, record in summary["drift"].items():
        assert record["kl"]["text"]["nats"] == pytest.approx(summary["text"][name]["kl"], rel=1e-4)
        assert set(record["surprise"]["model"]) == {"reference", "learned", "self", "replaced"}
    assert summary["drift"]["recovered"] != summary["drift"]["pruned"]
    shown = dict(table.lines(summary))
    assert "nats a token" in shown["drift, recovered"] and "unpruned" in shown["surprise by the data, recovered"]
    titles = {section.name: section for section in page.sections([summary], [])}
    assert [row[1] for row in titles["drift"].table["rows"]] == ["untuned", "sdd"]
    asked = (*asked, "drift.samples=2", "drift.temperature=1", "drift.size=4", "drift.max_new_tokens=96")
    other = json.loads(run(settings(*asked, "loss=sft"), tmp_path / "two").read_text())
    passes = [record["passes"] for record in other["drift"].values()]
    assert len(passes) == 2 and passes[0]["unpruned"] == passes[1]["unpruned"] and passes[0]["unpruned"]["1"] > 0.8
    assert "(unpruned " in dict(table.lines(other))["pass@k, recovered"]
    untrained = settings(*asked, "loss=none")
    assert {step.stage for step in look(untrained).steps if not step.present} == {"report"}


def made_up(arm: str, seed: int, removed: int, moved: float, lost: float) -> dict[str, Any]:
    """A summary with a drift by hand."""
    kl = {name: {"nats": moved, "top": 0.5} for name in ("prompts", "references", "samples", "text")}
    loss = {"nats": 1.0, "bits_per_byte": 0.5}
    sides = {side: {"learned": loss, "reference": loss} for side in ("unpruned", "model")}
    answers = {"mean_length": 9.0, "repetition": None, "cut_off": 0.0}
    record = {"kl": kl, "surprise": sides, "similarity": {"blocks": {"0": 1.0, "2": 0.75}}, "answers": answers}
    flipped = {"facts": {"right_to_wrong": 4 + seed, "wrong_to_right": 1}, "open": None}
    return {
        "choices": {"loss": arm, "seed": seed, "removed": removed},
        "artifacts": {"model": "m"},
        "cut": list(range(12 - removed)),
        "drift": {"pruned": record, "recovered": record},
        "scores": {"unpruned": {}, "pruned": {}, "recovered": {}},
        "flipped": {"pruned": flipped, "recovered": flipped},
        "recovery_held_out": 1 - lost,
        "likelihoods": {"recovered": {"bits_per_byte": {"average": 3 - lost}}},
    }


def test_arms_are_compared_over_seeds_and_predictors_within_cuts() -> None:
    """By hand: cuts cost far more than arms differ, and within each the arm that moved more lost more."""
    arms = {"sft": 0.4, "sdd": 0.2, "kd": 0.1, "sdd_kd": 0.3}
    runs = [
        made_up(arm, seed, removed, 10 - removed * (1 - drift) + 0.01 * seed, removed * (1 + drift) / 10)
        for removed in (2, 4, 6)
        for arm, drift in arms.items()
        for seed in range(3)
    ]
    found = {section.name: section for section in report_drift.drift_sections(runs)}
    at = {name: place for place, name in enumerate(found["drift"].table["header"])}
    first, second = found["drift"].table["rows"][:2]
    assert first[1:3] == ["untuned", "-"] and first[at["surprise of data"]] == "-"
    assert second[1:3] == ["sft", "3"] and second[at["KL on prompts"]] == "8.810 (8.785 to 8.835)"
    assert second[at["items lost"]] == "5.0" and second[at["least CKA"]].startswith("0.750")
    apart = [row for row in found["drift_differences"].table["rows"] if row[1] == "sdd - sft"]
    assert len(apart) == 3 and apart[0][3] == "-0.400 (-0.400 to -0.400)"
    told = found["predictors"].table["rows"]
    assert [row[0] for row in told[:2]] == ["KL on prompts", "surprise of data"]
    assert told[0][1:4] == ["beforehand", "12", "9"] and told[0][4].startswith("1.00")
    assert told[0][5].startswith("-1.00")  # bits that were made to fall where skills are lost
    assert told[1][4].startswith("0.00") and {row[1] for row in told[2:]} == {"exploratory"}
    assert len(found["predictors"].figures) == 2
    assert found["passes"].table["rows"] == []
    for each in runs[:12]:
        for record in each["drift"].values():
            record["passes"] = {
                "unpruned": {"1": 0.9, "4": 1.0},
                "model": {"1": 0.1 + each["choices"]["seed"] / 10, "4": 0.5},
            }
    passed = {section.name: section for section in report_drift.drift_sections(runs)}["passes"].table
    assert passed["header"][3:] == ["pass@1, %", "pass@4, %"]
    assert [row[1:3] for row in passed["rows"][:3]] == [["unpruned", "-"], ["untuned", "-"], ["sft", "3"]]
    assert passed["rows"][2][3] == "20.0 (-4.8 to 44.8)" and passed["rows"][0][3:] == ["90.0", "100.0"]
    few = {section.name: section for section in report_drift.drift_sections(runs[:9])}
    assert few["predictors"].table["rows"] == []
    for number, each in enumerate(runs[:9]):  # three writers of one cut are nine arms of it
        each["choices"] = each["choices"] | {"dataset.response": number % 3, "seed": 0}
        each["cut"] = runs[0]["cut"]
    told = {section.name: section for section in report_drift.drift_sections(runs[:9])}["predictors"].table["rows"]
    assert told[0][2:4] == ["9", "8"]


def test_a_plan_counts_drift() -> None:
    parts = [part for part in estimated(settings(*DRIFTED, "loss=sdd")).parts() if part.stage.startswith("drift")]
    assert {part.stage for part in parts} == {"drift pruned", "drift recovered"}
    assert all(part.reading > 0 for part in parts) and any(part.steps > 0 for part in parts)
    drawn = estimated(settings(*DRIFTED, "loss=sdd", "drift.samples=32", "drift.temperature=1")).parts()
    steps = [sum(part.steps for part in each if part.stage.startswith("drift")) for each in (parts, drawn)]
    assert steps[1] == pytest.approx(65 * steps[0])
    assert not [part for part in estimated(settings(*SMALL)).parts() if part.stage.startswith("drift")]


def test_drift_can_be_rehearsed(tmp_path: Path) -> None:
    given = ("+experiment=llama_30L", "+rehearse=cpu", "+drift=full", f"store={tmp_path / 'store'}")
    config = settings(*given)
    assert config["drift"]["size"] == 8 and any(line.startswith("drift:") for line in config["rehearse"])
    verify(config)
