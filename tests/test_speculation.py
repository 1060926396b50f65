"""Laws of speculative decoding: what comes out is the target's, and what is said of drafts is so."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from composing import SMALL, composed, resolve
from families import ALL_FAMILIES, WINDOW, adapt, build, tokens
from scipy.stats import chisquare
from test_decoding import WINDOWED, endings, generated, prompts
from transformers import LlamaConfig, LlamaForCausalLM

import sddx
from sddx.compression.compressed import compress
from sddx.compression.remove import Removal
from sddx.data import selfdata
from sddx.errors import UserError, mistakes_of, require_none
from sddx.models.anatomy import DECODER
from sddx.models.load import load_model, load_tokenizer
from sddx.records import Cut
from sddx.report import drafts as report_drafts
from sddx.report import page, table
from sddx.report.drafts import draft_sections
from sddx.speculation import decoding, rules
from sddx.speculation.decoding import Route, Sampling, can_draft, speculate
from sddx.speculation.measure import Drafts, hits
from sddx.speculation.rules import Counts, forced, speed_up
from sddx.stages.cost import estimated
from sddx.stages.draft import check as draft_check
from sddx.students.plain import write_merged
from sddx.students.teacher import SharedTeacher, beside
from sddx.tiny import data
from sddx.train import look, run, verify

CHECKPOINT = Path(sddx.__file__).parent / "tiny" / "checkpoint"
CUT = Cut((0, 1, 3, 4), 5)
MILD = Cut.without({3, 8}, 12)  # of the embedded model: some drafts stay, some do not
NEW = 12


def routes(family: str = "llama", cut: Cut = CUT, adapted: bool = True) -> tuple[Any, Any]:
    """A random model, and what a cut and an adapter make of it, in one set of weights."""
    student = build(family).requires_grad_(False)
    made = compress(student, [Removal(cut)])
    made.model = adapt(student) if adapted else student
    return beside(SharedTeacher(made)), made.model


def embedded(cut: Cut) -> tuple[Any, Any, list[list[int]], list[int]]:
    """The embedded model and what a cut leaves of it, prompts, and the tokens that end an answer."""
    model, tokenizer = load_model(CHECKPOINT).requires_grad_(False), load_tokenizer(CHECKPOINT)
    rows = data.dataset(
        skill="arithmetic", shift=1.0, size=9, seed=0, check=None, rewrite="tiny", trains=[]
    ).examples
    asked = selfdata.token_ids(tokenizer, [selfdata.render(tokenizer, row.prompt) for row in rows])
    ends = selfdata.end_ids(model, tokenizer)
    return beside(SharedTeacher(compress(model, [Removal(cut)]))), model, asked, ends


def one_hot(chosen: torch.Tensor, size: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(chosen, size).double()


@pytest.mark.parametrize("family", sorted(ALL_FAMILIES))
def test_the_target_is_the_unpruned_model_without_the_adapter(family: str) -> None:
    """Its logits, its weights and no more: what is only off would be counted, and take time."""
    whole = build(family).requires_grad_(False)
    names = {name: weight.shape for name, weight in whole.named_parameters()}
    ids = torch.tensor([[1, 5, 9, 4]])
    expected = whole(input_ids=ids).logits
    target, draft = routes(family)
    assert {name: weight.shape for name, weight in target.named_parameters()} == names
    own = {id(weight) for weight in target.parameters()}
    assert any(weight.requires_grad for weight in draft.parameters() if id(weight) not in own)
    assert torch.equal(target(input_ids=ids).logits, expected)


def test_what_comes_out_is_distributed_as_the_target_by_enumeration() -> None:
    """Every draft of two tokens out of three, with its probability, under every number of a grid on which all that
    is compared falls: the first token by p, the next by p given it, the third by p given both."""
    q = torch.tensor([2.0, 2.0, 4.0], dtype=torch.float64) / 8
    first = torch.tensor([1.0, 4.0, 3.0], dtype=torch.float64) / 8
    second = torch.tensor([[4.0, 3.0, 1.0], [2.0, 2.0, 4.0], [1.0, 4.0, 3.0]], dtype=torch.float64) / 8
    third = torch.tensor([2.0, 4.0, 2.0], dtype=torch.float64) / 8
    grid = [(number + 0.5) / 12 for number in range(12)]
    cases = list(itertools.product(range(3), range(3), grid, grid, grid))
    drafted = torch.tensor([case[:2] for case in cases])
    target = torch.stack([first.expand(len(cases), 3), second[drafted[:, 0]], third.expand(len(cases), 3)], dim=1)
    uniforms = torch.tensor([[(a, own), (b, own), (0.0, own)] for *_, a, b, own in cases], dtype=torch.float64)
    accepted, own = rules.sampled(drafted, q.expand(len(cases), 2, 3), target, uniforms)
    weights = q[drafted].prod(1) / 12**3

    def distribution(tokens: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(3, dtype=torch.float64).index_add(0, tokens[among], weights[among])
        return total / total.sum()

    emitted = torch.where(accepted >= 1, drafted[:, 0], own)
    everywhere = torch.ones_like(emitted, dtype=torch.bool)
    torch.testing.assert_close(distribution(emitted, everywhere), first)
    for token in range(3):
        after = (accepted >= 1) & (drafted[:, 0] == token)
        torch.testing.assert_close(
            distribution(torch.where(accepted == 2, drafted[:, 1], own), after), second[token]
        )
    torch.testing.assert_close(distribution(own, accepted == 2), third)


def test_the_sampling_rule_of_certain_models_is_the_greedy_rule() -> None:
    draw = torch.Generator().manual_seed(0)
    drafted = torch.randint(3, (200, 4), generator=draw)
    logits = torch.randn(200, 5, 3, generator=draw)
    uniforms = torch.rand(200, 5, 2, generator=draw, dtype=torch.float64)
    by_odds = rules.sampled(drafted, one_hot(drafted, 3), one_hot(logits.argmax(-1), 3), uniforms)
    for mine, theirs in zip(by_odds, rules.greedy(drafted, logits), strict=True):
        assert torch.equal(mine, theirs)


def test_equal_probabilities_accept_all() -> None:
    odds = torch.rand(50, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(-1)
    drafted = torch.randint(7, (50, 3), generator=torch.Generator().manual_seed(1))
    uniforms = torch.rand(50, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    accepted, own = rules.sampled(drafted, odds[:, :-1], odds, uniforms)
    assert accepted.tolist() == [3] * 50
    assert torch.equal(own, rules.drawn(odds[:, -1], uniforms[:, -1, 1]))


@pytest.mark.parametrize("family", sorted({*ALL_FAMILIES, "granite"} - {*WINDOWED}))
def test_greedy_text_is_the_targets(family: str) -> None:
    """Token for token, the first included, for every lookahead and batch, where rows end at different places."""
    target, draft = routes(family)
    asked = prompts(2)
    assert can_draft(target, 60) and can_draft(draft, 60)
    ends = endings(target, asked, NEW)
    expected = [generated(target, row, NEW, ends) for row in asked]
    assert len({len(row) for row in expected}) > 1
    for lookahead, size in ((1, 1), (3, 4), (5, len(asked))):
        how = {"lookahead": lookahead, "max_new_tokens": NEW, "batch_size": size, "ends": ends}
        assert speculate(target, draft, asked, **how)[0] == expected


def test_rounding_of_the_models_own_dtype_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide models in bfloat16 round as much as this from one batch to another; in float32 it would be a fault."""
    read = Route.read

    def rounded(route: Route, *given: Any) -> torch.Tensor:
        logits = read(route, *given)
        return logits * (1 + 2**-8 * torch.rand_like(logits))

    model = build("llama")
    monkeypatch.setattr(Route, "read", rounded)
    assert not can_draft(model, 60)
    assert can_draft(model.to(torch.bfloat16), 60)


@pytest.mark.parametrize("family", sorted({*ALL_FAMILIES, "granite"} - {*WINDOWED}))
def test_a_fault_is_found_in_half_precision_too(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A route that does not go back reads on behind what was refused."""
    model = build(family).to(torch.bfloat16)
    assert can_draft(model, 60)
    monkeypatch.setattr(Route, "back", lambda route, lengths: None)
    assert not can_draft(model, 60)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("lost", ["no_attention", "no_feedforward"])
def test_drafts_without_branches_draft(family: str, lost: str) -> None:
    target, draft = routes(family, Cut((0, 1, 2, 3, 4), 5, **{lost: (0, 2)}), adapted=False)
    asked = prompts(0)
    found, _ = speculate(target, draft, asked, lookahead=3, max_new_tokens=NEW, batch_size=4, ends=[])
    assert found == [generated(target, row, NEW, []) for row in asked]


@pytest.mark.parametrize("family", WINDOWED)
def test_windows_must_hold_the_whole_text(family: str) -> None:
    target, draft = routes(family)
    assert not can_draft(target, WINDOW) and can_draft(draft, WINDOW - 1)
    how = {
        "lookaheads": [2],
        "size": 2,
        "max_new_tokens": WINDOW,
        "batch_size": 2,
        "temperature": 0.0,
        "seed": 0,
        "datasets": {},
    }
    with pytest.raises(UserError, match="cannot go back in texts of"):
        Drafts(**how)(target, draft, prompts(0, (3, 2)), [])


def test_a_draft_that_is_the_target_is_accepted_whole() -> None:
    """Greedily and sampled: each pass brings as many tokens as it may."""
    target, _ = routes()
    asked = prompts(0)
    for temperature in (0.0, 0.8):
        how = {"lookahead": 4, "max_new_tokens": 15, "batch_size": 4, "ends": [], "temperature": temperature}
        _, counts = speculate(target, target, asked, **how)
        assert counts == [Counts(15, 3, 12, 12)] * len(asked)


def test_a_text_that_ends_within_a_draft_tests_no_more_of_it() -> None:
    target, _ = routes()
    asked = prompts(0)[:1]
    ends = [generated(target, asked[0], 3, [])[2]]
    assert generated(target, asked[0], 9, ends)[-1] == ends[0]
    written, counts = speculate(target, target, asked, lookahead=8, max_new_tokens=9, batch_size=1, ends=ends)
    length = len(written[0])
    assert counts == [Counts(length, 1, length, length)]


def test_both_routes_are_one_set_of_weights_and_leave_each_other_alone() -> None:
    """The target is the unpruned model, without the adapter; the student is what it was."""
    plain, ids = build("llama"), tokens()
    student = build("llama").requires_grad_(False)
    made = compress(student, [Removal(CUT)])
    student = made.model = adapt(student)
    before = student(input_ids=ids).logits
    target = beside(SharedTeacher(made))
    assert torch.equal(target(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert torch.equal(student(input_ids=ids).logits, before)
    held = {id(weight) for weight in made.whole[DECODER].blocks.parameters()} | {
        id(weight) for weight in student.parameters()
    }
    assert {id(weight) for weight in target.parameters()} <= held
    assert target.config.num_hidden_layers == 5 and student.config.num_hidden_layers == 4


@pytest.mark.parametrize("family", ["llama", "mpt", "opt"])
def test_going_back_is_as_never_having_been_there(family: str) -> None:
    """Rows of different lengths that read on, go back by different lengths and leave have the logits of each
    alone."""
    model, draw = build(family), random.Random(0)
    texts = [[draw.randrange(2, 64) for _ in range(40)] for _ in range(4)]
    route, at, names = Route(model, 4, 60), [0] * 4, [0, 1, 2, 3]
    for step in range(12):
        astray = [
            texts[n][: at[i]] + [draw.randrange(2, 64) for _ in range(draw.randint(1, 3))]
            for i, n in enumerate(names)
        ]
        with torch.no_grad():
            route.read(astray)
            route.back(at)
            at = [place + draw.randint(2, 3) for place in at]
            found = route.read([texts[n][:end] for n, end in zip(names, at, strict=True)], 2)
            for row, (n, end) in enumerate(zip(names, at, strict=True)):
                alone = model(input_ids=torch.tensor([texts[n][:end]])).logits[0, -2:]
                torch.testing.assert_close(found[row], alone, atol=1e-4, rtol=1e-4)
        if step in (4, 8):
            route.drop(0)
            names[0], at[0] = names[-1], at[-1]
            names, at = names[:-1], at[:-1]


@pytest.mark.parametrize("lookahead", [1, 2, 5])
def test_one_pass_over_the_targets_text_tells_what_drafting_comes_to(lookahead: int) -> None:
    """Row by row, whatever the batches, and of texts that end by themselves and that are cut off."""
    target, draft, asked, ends = embedded(MILD)
    for most in (7, 40):
        how = {"lookahead": lookahead, "max_new_tokens": most, "batch_size": 4, "ends": ends}
        texts, counts = speculate(target, draft, asked, **how)
        assert [forced(row, lookahead) for row in hits(draft, asked, texts, 4)] == counts
    total = sum(counts, Counts())
    assert 0 < total.accepted < total.tested


def test_samples_are_distributed_as_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chi-square over all texts of three tokens of a tiny model's, by its own probabilities."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=5, initializer_range=0.5, **shape)).eval().requires_grad_(False)
    cut = Cut((0, 1, 3), 4)
    target = beside(SharedTeacher(compress(model, [Removal(cut)])))

    class Free(Sampling):
        """Numbers of their own for rows of one prompt."""

        def __init__(self, prompts: Any, places: int, *given: Any) -> None:
            super().__init__(prompts[:1], places, *given)
            draw = torch.Generator().manual_seed(3)
            self.uniforms = torch.rand(len(prompts), places, 3, generator=draw, dtype=torch.float64)

    monkeypatch.setattr(decoding, "Sampling", Free)
    rows, temperature = 6000, 1.3
    how = {"lookahead": 2, "max_new_tokens": 3, "batch_size": rows, "ends": [], "temperature": temperature}
    texts, counts = speculate(target, model, [[1, 2]] * rows, **how)
    assert 0.1 < sum(counts, Counts()).rates["acceptance"] < 0.97
    every = list(itertools.product(range(5), repeat=3))
    with torch.no_grad():
        logits = target(input_ids=torch.tensor([[1, 2, *text] for text in every])).logits[:, 1:-1]
    odds = (
        (logits.double() / temperature).softmax(-1).gather(-1, torch.tensor(every)[..., None]).prod(1).squeeze(-1)
    )
    seen = [sum(tuple(text) == each for text in texts) for each in every]
    common = odds * rows >= 5
    observed = [*itertools.compress(seen, common), sum(itertools.compress(seen, ~common))]
    expected = [*(rows * odds[common]).tolist(), float(rows * odds[~common].sum())]
    assert chisquare(observed, expected).pvalue > 0.01
    with torch.no_grad():
        of_draft = model(input_ids=torch.tensor([[1, 2, *text] for text in every])).logits[:, 1:-1]
    other = (
        (of_draft.double() / temperature).softmax(-1).gather(-1, torch.tensor(every)[..., None]).prod(1).squeeze(-1)
    )
    wrong = [*(rows * other[common]).tolist(), float(rows * other[~common].sum())]
    assert chisquare(observed, wrong).pvalue < 1e-6  # the test would tell the draft's own


def test_samples_hang_on_no_neighbour_and_no_batch() -> None:
    target, draft = routes()
    asked = prompts(0)
    how = {"lookahead": 3, "max_new_tokens": NEW, "ends": [1], "temperature": 1.0, "seed": 5}
    texts, _ = speculate(target, draft, asked, batch_size=len(asked), **how)
    assert speculate(target, draft, asked, batch_size=2, **how)[0] == texts
    assert speculate(target, draft, asked[3:], batch_size=2, **how)[0] == texts[3:]
    assert speculate(target, draft, asked, batch_size=2, **{**how, "seed": 6})[0] != texts


def test_transformers_assisted_generation_writes_the_same(tmp_path: Path) -> None:
    """With the exported student, a lookahead that stays and no threshold that ends drafts early."""
    target, draft, asked, ends = embedded(MILD)
    write_merged(draft, CHECKPOINT, tmp_path / "student")
    exported, whole = load_model(tmp_path / "student"), load_model(CHECKPOINT)
    exported.generation_config.num_assistant_tokens = 4
    exported.generation_config.num_assistant_tokens_schedule = "constant"
    exported.generation_config.assistant_confidence_threshold = 0.0
    found, _ = speculate(target, draft, asked, lookahead=4, max_new_tokens=40, batch_size=4, ends=ends)
    for prompt, text in zip(asked, found, strict=True):
        ids = torch.tensor([prompt])
        how = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": ends, "pad_token_id": 0}
        made = whole.generate(ids, attention_mask=torch.ones_like(ids), assistant_model=exported, **how)
        assert made[0, len(prompt) :].tolist() == text


def test_expected_speed_up() -> None:
    """By hand; above 1 with one token ahead only where the acceptance exceeds the cost."""
    assert speed_up(0.5, 2, 0.25) == pytest.approx(1.75 / 1.5)
    assert speed_up(1.0, 3, 0.5) == pytest.approx(4 / 2.5)
    assert speed_up(0.0, 4, 0.5) == pytest.approx(1 / 3)
    assert speed_up(0.7, 1, 0.7) == pytest.approx(1.0)
    assert speed_up(0.71, 1, 0.7) > 1 > speed_up(0.69, 1, 0.7)


def test_what_is_measured_agrees_with_itself() -> None:
    """Forced and measured counts, the texts of plain decoding, and what one set of weights saves."""
    target, draft, asked, ends = embedded(MILD)
    how = {"size": 6, "max_new_tokens": 24, "batch_size": 4, "temperature": 0.0, "seed": 0, "datasets": {}}
    found = Drafts(**how, lookaheads=[1, 3])(target, draft, asked, ends)
    assert found["prompts"] == 6 and found["skipped"] == 0 and list(found["forced"]) == ["1", "2", "3"]
    for ahead, record in found["lookaheads"].items():
        assert record["same_texts"] == 6
        assert {name: record[name] for name in found["forced"][ahead]} == found["forced"][ahead]
    held = found["bytes"]
    assert held["plain"] < held["one_copy"] < held["two_copies"]
    assert held["one_copy"] - held["plain"] < 0.2 * held["plain"]
    sampled = Drafts(**{**how, "temperature": 1.0}, lookaheads=[2])(target, draft, asked, ends)
    assert sampled["forced"] == {} and 0 < sampled["lookaheads"]["2"]["acceptance"] < 1


def test_prompts_that_fill_the_context_are_left_out() -> None:
    target, draft = routes()
    how = {
        "lookaheads": [2],
        "size": 3,
        "max_new_tokens": 8,
        "batch_size": 2,
        "temperature": 0.0,
        "seed": 0,
        "datasets": {},
    }
    found = Drafts(**how)(target, draft, prompts(0, (3, 125, 4)), [])
    assert found["prompts"] == 2 and found["skipped"] == 1
    with pytest.raises(UserError, match="leaves room for 11 tokens in the model's context of 128"):
        Drafts(**how)(target, draft, prompts(0, (125,)), [])


DRAFTED = (*SMALL, "+speculation=draft", "speculation.size=8", "speculation.lookaheads=[1,3]")


def settings(*given: str) -> dict[str, Any]:
    with composed(*given) as cfg:
        return resolve(cfg)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["speculation.size=9"], r"speculation.size=9 prompts .* validation=8 holds out fewer. Use validation=9"),
        (["speculation.lookaheads=[]"], r"speculation.lookaheads=\[\]: tokens that are drafted at a time"),
        (["speculation.lookaheads=[2,0]"], r"Give one number or more, each once and from 1"),
        (
            ["speculation.max_new_tokens=2000"],
            "No held-out prompt leaves room for 2004 tokens in the model's context",
        ),
        (["speculation.temperature=-1"], "speculation.temperature=-1 must be 0 or more"),
        (["+speculation.datasets.other={_target_: sddx.tiny.data.dataset}"], "speculation.datasets.other.skill"),
    ],
)
def test_what_cannot_be_drafted_is_refused_before_work(given: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        verify(settings(*DRAFTED, *given))


def test_drafts_are_tried_on_no_prompt_that_was_trained_on(tmp_path: Path) -> None:
    """Of the same file in another order; a run without training, and one that holds the same rows out, may."""
    rows = [{"prompt": f"what is {n}?", "response": f"it is {n}"} for n in range(40)]
    (path := tmp_path / "rows.jsonl").write_text("".join(map("{}\n".format, map(json.dumps, rows))))
    asked = (*DRAFTED[1:], "dataset=jsonl", f"dataset.path={path}", "dataset.size=24")
    beside = ("+dataset@speculation.datasets.other=jsonl", f"speculation.datasets.other.path={path}")
    for given, refused in (([], False), (["speculation.datasets.other.seed=1"], True)):
        for loss in ("sft", "none"):
            checks = draft_check.of_settings(settings(*asked, *beside, *given, f"loss={loss}"))
            said = [each for each in mistakes_of(checks) if "held out for speculation.datasets.other" in each]
            assert len(said) == (refused and loss == "sft")


def test_drafts_in_shards_are_refused() -> None:
    config = settings(*DRAFTED)
    config["trainer"] = {**config["trainer"], "strategy": "fsdp"}
    with pytest.raises(UserError, match="on one device that holds the model whole"):
        require_none(mistakes_of(draft_check.of_settings(config)))


def test_a_run_says_what_its_models_are_worth_as_drafts(tmp_path: Path) -> None:
    """The pruned and the recovered one; a run that trains nothing finds the pruned one's in the store."""
    store = tmp_path / "store"
    asked = (*DRAFTED, f"store={store}", "+dataset@speculation.datasets.comparison=tiny_comparison")
    summary = json.loads(run(settings(*asked, "loss=sft"), tmp_path / "one").read_text())
    assert {name: list(of) for name, of in summary["drafts"].items()} == {
        name: ["dataset", "comparison"] for name in ("pruned", "recovered")
    }
    for found in (found for of in summary["drafts"].values() for found in of.values()):
        assert found["prompts"] == 8 and found["measured"]["tokens_per_second"]["plain"] > 0
        for ahead in ("1", "3"):
            assert found["lookaheads"][ahead]["same_texts"] == 8
            assert found["lookaheads"][ahead]["acceptance"] == found["forced"][ahead]["acceptance"]
    shown = dict(table.lines(summary))
    assert "accepted" in shown["draft recovered, 3 ahead, comparison"] and "memory" in shown["drafts were timed on"]
    titles = {section.name: section for section in page.sections([summary], [])}
    drafted = {tuple(row[:4]) for row in titles["drafts"].table["rows"]}
    assert ("all runs", "untuned", "tiny_arithmetic", "1") in drafted and len(drafted) == 8
    untrained = settings(*asked, "loss=none")
    missing = {step.stage for step in look(untrained).steps if not step.present}
    assert missing == {"report"}
    alone = json.loads(run(untrained, tmp_path / "two").read_text())
    assert alone["drafts"] == {"pruned": summary["drafts"]["pruned"]}


def test_arms_are_compared_as_drafts_over_seeds() -> None:
    """By hand: three seeds of two arms, and one pruned model."""

    def of(acceptance: float) -> dict[str, Any]:
        rates = {"acceptance": acceptance, "accepted_length": 1.0, "length": 2.0, "saved": 0.5}
        timed = {"speed_up": 0.9, "promised": 1.1}
        return {"dataset": {"lookaheads": {"4": rates}, "measured": {"lookaheads": {"4": timed}}}}

    runs = [
        {
            "choices": {"loss": arm, "seed": seed, "dataset": "mine", "removed": 2, "pruning": "angular"},
            "drafts": {"pruned": of(0.5), "recovered": of(0.6 + gain + 0.1 * seed)},
            "scores": {"unpruned": {}, "pruned": {}, "recovered": {}},
            "artifacts": {"model": "m"},
            "blocks": 3,
            "cut": [0],
        }
        for arm, gain in (("sft", 0.0), ("sdd", 0.05))
        for seed in range(3)
    ]
    worth, _, apart = (section.table["rows"] for section in draft_sections(runs))
    assert worth[0] == ["all runs", "untuned", "mine", "4", "-", "50.0 %", "1.00", "2.00", "50.0 %", "0.90", "1.10"]
    assert [row[1] for row in worth] == ["untuned", "sft", "sdd"]
    assert worth[1][5] == "70.0 % (45.2 to 94.8)"  # t(2) times 10 / sqrt(3)
    assert apart == [["all runs", "sdd - sft", "mine", "4", "3", "+5.0 (+5.0 to +5.0)"]]


def test_scores_are_held_against_drafts_of_random_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One metric orders ten cuts as their drafts do, another the other way round; seeds of a cut are averaged."""
    scores = {"good": [float(unit) for unit in range(10)], "bad": [-float(unit) for unit in range(10)]}
    monkeypatch.setattr(report_drafts, "scores_of", lambda run: {"mean": scores[run["choices"]["pruning"]]})

    def of(pruning: str, gone: int, acceptance: float) -> dict[str, Any]:
        found = {"lookaheads": {"10": {"acceptance": 0.1}, "2": {"acceptance": acceptance}}}
        return {
            "choices": {"pruning": pruning, "removed": 1, "loss": "none"},
            "artifacts": {"model": "m"} | ({"score": pruning} if pruning != "random" else {}),
            "blocks": 10,
            "cut": [unit for unit in range(10) if unit != gone],
            "drafts": {"pruned": {"dataset": found}},
            "scores": {"unpruned": {}, "pruned": {}},
            "subjects": [{"name": "unpruned", "role": "reference"}, {"name": "pruned", "role": "cut"}],
        }

    drawn = [of("random", gone, (90 - gone + seed) / 100) for gone in range(10) for seed in (0, 1)]
    runs = [*drawn, of("good", 0, 0.9), of("bad", 9, 0.8)]
    good, bad = report_drafts.cut_table(runs)["rows"]
    assert good[:4] == ["1 removed", "untuned", "good", "10"] and good[4].startswith("1.00 (1.00")
    assert bad[2] == "bad" and bad[4].startswith("-1.00") and good[5:] == ["90.0 %", "86.0 %"]
    assert report_drafts.cut_table(runs[6:])["rows"] == []


def test_own_weights_are_a_second_copy(tmp_path: Path) -> None:
    """After full fine-tuning nothing is shared; the text is still the target's."""
    given = (*DRAFTED, f"store={tmp_path / 'store'}", "loss=sft", "tuning=full")
    found = json.loads(run(settings(*given), tmp_path / "one").read_text())["drafts"]
    one, two = (found[name]["dataset"]["bytes"] for name in ("pruned", "recovered"))
    assert one["one_copy"] < one["two_copies"] == two["two_copies"] == two["one_copy"]
    assert found["recovered"]["dataset"]["lookaheads"]["3"]["same_texts"] == 8


def test_a_plan_counts_drafts() -> None:
    parts = estimated(settings(*DRAFTED, "loss=sft")).parts()
    assert {part.stage for part in parts} >= {"draft pruned", "draft recovered"}
    assert all(part.steps > 0 for part in parts if part.stage.startswith("draft"))
    assert not [part for part in estimated(settings(*SMALL)).parts() if part.stage.startswith("draft")]


def test_drafts_can_be_rehearsed(tmp_path: Path) -> None:
    """On the rows that a rehearsal holds out, and said so."""
    given = ("+experiment=llama_30L", "+rehearse=cpu", "+speculation=draft", f"store={tmp_path / 'store'}")
    config = settings(*given)
    assert config["speculation"]["size"] == 8 and any(line.startswith("drafts:") for line in config["rehearse"])
    verify(config)
