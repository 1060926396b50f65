"""The embedded world: the same bytes anywhere, disjoint splits, a tokenizer that gives text back."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
import yaml

from sddx.config.build import build
from sddx.data.checkers import last_number
from sddx.errors import UserError
from sddx.evaluation import items, tasks
from sddx.tiny import data, lexicon, skills, write_tasks
from sddx.tiny.corpus import documents, drawn, item_of
from sddx.tiny.dice import Dice
from sddx.tiny.vocabulary import build_tokenizer

lines = cache(write_tasks.lines)
CHECKPOINT = Path(data.__file__).parent / "checkpoint"
CONF = Path(__file__).parents[1] / "conf"
# sha256 of the texts on which blocks are scored, and of the first 2,000 documents of pretraining
CALIBRATION = "37ac4adde21ca98da031d2efe02c3eda158592c766325faf363a9f8f5ca9bd82"
FINGERPRINT = "5a68cfadfe330b048c6a4607e617c74214b39f065e702336df894cf564a1d04f"


def test_the_corpus_is_the_same_byte_for_byte() -> None:
    """No edit changes the world unnoticed: claims were made about this one."""
    text = "".join(given + answered for given, answered in islice(documents("pretrain", 2000), 2000))
    assert hashlib.sha256(text.encode()).hexdigest() == FINGERPRINT


@pytest.mark.parametrize("skill", skills.SKILLS)
@pytest.mark.parametrize("split", ["report", "selection"])
def test_the_task_files_are_what_the_recipe_writes(skill: str, split: str) -> None:
    written = (write_tasks.FOLDER / f"{skill}.{split}.jsonl").read_text().splitlines()
    assert written == lines(skill, split)
    assert len(written) == write_tasks.COUNTS[split]
    questions = [json.loads(line) for line in written]
    assert len({json.dumps(question, sort_keys=True) for question in questions}) == len(questions)


@pytest.mark.parametrize("skill", [skill for skill in skills.SKILLS if skill not in skills.SHARED])
def test_splits_are_disjoint_in_canonical_form(skill: str) -> None:
    """An operation with its numbers, or a pair of facts, stands in one split only."""
    forms = {
        split: {item.form for item in islice(skills.items(skill, split), 60)}
        for split in skills.SPLITS
        if not (skill == "two_hop" and split == "finetune")
    }
    for split, found in forms.items():
        assert all(skills.split_of(skill, form) == split for form in found)
        assert not any(found & other for name, other in forms.items() if name != split)


def test_held_out_text_asks_nothing_that_calibration_asks() -> None:
    """In canonical form, at any sizes and seeds, facts and rumours included; and every kind is in both."""
    forms = {
        split: {
            (kind, item_of(kind, split, name).form)
            for size, seed in shapes
            for kind, name in drawn(split, size, seed)
        }
        for split, shapes in {"calibration": ((256, 0), (700, 0), (400, 1)), "text": ((256, 1), (700, 0))}.items()
    }
    assert not forms["calibration"] & forms["text"]
    assert len({kind for kind, _ in forms["calibration"]}) == len({kind for kind, _ in forms["text"]}) == 10
    groups = [yaml.safe_load((CONF / group / "tiny.yaml").read_text()) for group in ("calibration", "text")]
    scored, judged = ({*build(group)} for group in groups)
    assert not scored & judged


def test_the_first_calibration_texts_are_those_that_cuts_were_chosen_on() -> None:
    text = "".join(data.conversations(split="calibration", size=256, seed=0))
    assert hashlib.sha256(text.encode()).hexdigest() == CALIBRATION


def questions(skill: str, split: str) -> list[str]:
    return [json.loads(line)["question"] for line in lines(skill, split)]


@pytest.mark.parametrize("skill", skills.SKILLS)
def test_no_item_is_in_report_and_selection(skill: str) -> None:
    """Where facts are shared, questions come again with other wrong choices, as many as the pages say."""
    assert not {*lines(skill, "report")} & {*lines(skill, "selection")}
    again = sum(question in questions(skill, "report") for question in questions(skill, "selection"))
    assert again == {"facts": 93, "myths": 124}.get(skill, 0)


@pytest.mark.parametrize("skill", skills.SKILLS)
def test_items_of_one_question_are_one_draw(skill: str) -> None:
    """Each task whose questions come again names them as its clusters."""
    number = {split: len({*questions(skill, split)}) for split in write_tasks.COUNTS}
    for split, name in (("report", f"tiny_{skill}"), ("selection", f"tiny_{skill}_selection")):
        (task,) = tasks.load([name], None)[0]["tasks"].values()
        found = [items.cluster_of(task, document) for document in task.eval_docs]
        repeated = number != write_tasks.COUNTS
        assert found == (questions(skill, split) if repeated else [None] * len(found))
    if skill == "two_hop":
        assert number == {"report": 66, "selection": 7}


@pytest.mark.parametrize("skill", skills.SKILLS)
def test_the_right_choice_is_right_and_alone(skill: str) -> None:
    for item in islice(skills.items(skill, "report"), 100):
        if item.choices:
            assert item.choices[0] == item.answer and len(set(item.choices)) == len(item.choices)


def test_worked_answers_compute() -> None:
    """Every equation in an own answer holds, and both styles end in the same number."""
    for item in islice(skills.items("arithmetic", "finetune"), 300):
        for equation in item.answer.split(". ")[:-1]:
            left, right = equation.split(" = ")
            assert eval(left.replace("x", "*")) == int(right)  # our own digits and signs
        assert last_number(item.reference, item.answer) and item.reference != item.answer


def test_two_hop_choices_break_at_one_hop() -> None:
    """The first wrong choice has the right middle and a wrong end, so that the second hop is needed."""
    for item in islice(skills.items("two_hop", "report"), 50):
        right, near = item.choices[:2]
        assert near.split(". ")[0] == right.split(". ")[0] and near != right


def test_the_style_dial_is_nested() -> None:
    """At 0 every reference is in the model's own style, at 1 none is, and a foreign row stays foreign."""
    made = {shift: make(shift=shift) for shift in (0.0, 0.3, 0.7, 1.0)}
    foreign = {shift: {e.id for e in rows if "####" in e.response} for shift, rows in made.items()}
    assert not foreign[0.0] and len(foreign[1.0]) == 200
    assert foreign[0.3] < foreign[0.7] < foreign[1.0]
    assert 0.2 < len(foreign[0.3]) / 200 < 0.4


def make(**settings: object) -> list:
    plain = {"skill": "arithmetic", "shift": 1.0, "size": 200, "seed": 0, "rewrite": "tiny", "trains": []}
    return data.dataset(check=last_number, **(plain | settings)).examples  # type: ignore[arg-type]


def test_a_smaller_set_is_the_head_of_a_larger_one() -> None:
    assert make(size=200)[:50] == make(size=50)
    assert {e.id for e in make(seed=1)} != {e.id for e in make()}


@pytest.mark.parametrize("wrong", [{"skill": "myths"}, {"shift": 1.5}, {"size": 0}, {"size": 10**6}])
def test_impossible_sets_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        make(**wrong)


def test_the_shipped_tokenizer_is_the_one_the_recipe_builds_and_gives_text_back() -> None:
    from sddx.models.load import load_tokenizer

    shipped, built = load_tokenizer(CHECKPOINT), build_tokenizer()
    assert shipped.get_vocab() == built.get_vocab()
    for given, answered in islice(documents("pretrain", 300, seed=9), 300):
        ids = shipped(given + answered, add_special_tokens=False)["input_ids"]
        assert shipped.unk_token_id not in ids
        plain = answered.removesuffix("<|end|>")
        assert shipped.decode(shipped(plain)["input_ids"]) == plain


def test_the_checkpoint_is_small_and_says_where_it_comes_from() -> None:
    weights = CHECKPOINT / "model.safetensors"
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert weights.stat().st_size < 8e6
    assert config["model_type"] == "llama" and 12 <= config["num_hidden_layers"] <= 16
    assert "sha256" in (CHECKPOINT / "README.md").read_text()


def test_dice_do_not_depend_on_the_hash_seed_or_the_version() -> None:
    """Known draws: a change of generator would move every number of the world."""
    dice = Dice("known")
    assert [dice.below(1000) for _ in range(4)] == [720, 184, 611, 670]


def test_every_person_has_one_answer_to_every_question() -> None:
    assert all(lexicon.CITY_OF[person] in lexicon.CITY_IN for person in lexicon.PEOPLE)
    assert all(lexicon.TRUTH_OF[kind] != lexicon.RUMOUR_OF[kind] for kind in lexicon.SUBJECTS)


def test_the_model_uses_a_reference_that_it_is_shown() -> None:
    """More answers are right with the reference in the rewriting prompt than without; in both styles of it the
    model answers in its own (it would leak the foreign `####` otherwise)."""
    from sddx.data.selfdata import acceptance, judge, write_answers
    from sddx.data.templates import rewriting_prompt
    from sddx.models.load import load_model, load_tokenizer

    model, tokenizer = load_model(CHECKPOINT), load_tokenizer(CHECKPOINT)
    greedy = {"max_new_tokens": 64, "batch_size": 128, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0}

    def accepted(shift: float, guided: bool) -> int:
        rows = make(size=256, shift=shift)
        shown = [rewriting_prompt("tiny", row.prompt, row.response) if guided else row.prompt for row in rows]
        answers = write_answers(model, tokenizer, shown, **greedy)
        assert not any("####" in answer.text for answer in answers)
        return acceptance(judge(rows, answers, check=last_number))["accepted"]

    plain, guided, own = accepted(1.0, False), accepted(1.0, True), accepted(0.0, True)
    assert guided > plain and own > 0.9 * 256
