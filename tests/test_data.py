"""Laws of the data room: checkers, templates, sources, shards and encoding."""

import hashlib
import json
import os
import random
import re
from contextlib import nullcontext
from dataclasses import asdict
from fractions import Fraction
from functools import partial
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from words import tiny_llama, word_tokenizer

from sddx.data import checkers
from sddx.data.encode import (
    TEXT_BATCH,
    TEXT_TOKENS,
    collate,
    encode,
    encode_all,
    ending,
    render,
    require_system_turn,
    text_batches,
    text_spans,
)
from sddx.data.overlap import overlapping
from sddx.data.shards import cut, read_examples, write_shards
from sddx.data.sources import hub, hub_texts, jsonl, pinned, texts
from sddx.data.tables import read_table
from sddx.data.templates import TEMPLATES, leaks, rewriting_prompt
from sddx.errors import UserError
from sddx.evaluation.tasks import OWN_TASKS
from sddx.models.load import load_tokenizer
from sddx.records import Dataset, Example

pytestmark = pytest.mark.fast

GSM8K_ROWS = [
    {
        "question": "Ann has 3 nets of 4 balls. How many balls?",
        "answer": "3*4 = <<3*4=12>>12 balls.\n#### 12",
    },
    {
        "question": "A farm sells 600 eggs twice. How many?",
        "answer": "2*600 = $<<2*600=1200>>1200\n#### 1,200",
    },
    {
        "question": "It was 2 degrees and fell by 5. And now?",
        "answer": "2-5 = <<2-5=-3>>-3 degrees.\n#### -3",
    },
]
ALPACA_ROWS = [
    {"instruction": "Name a sweet fruit.", "input": "", "output": "A pear."},
    {"instruction": "Put this into the past.", "input": "I walk.", "output": "I walked.\u2028"},
    {"instruction": "Say nothing.", "input": "", "output": " "},
]


def real_file(name: str) -> str:
    folder = os.environ.get("SDDX_REAL_DATA")
    if not folder:
        pytest.skip("SDDX_REAL_DATA names no folder of real data")
    return str(Path(folder) / name)


def lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(path: Path, count: int) -> str:
    return lines(path, [{"q": f"what is {row}", "a": f"answer {row}"} for row in range(count)])


def load(path: str, **changes) -> Dataset:
    settings = {
        "prompt": "q",
        "response": "a",
        "size": None,
        "seed": 0,
        "check": checkers.none,
        "rewrite": "math",
    }
    return jsonl(path=path, **(settings | changes))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She sold 48/2 = <<48/2=24>>24 clips.\n#### 72", 72),
        ("It costs $1,234.50.", "1234.50"),
        ("#### 109,200,000", 109200000),
        ("That is 50% of them", 50),
        ("The answer is -3.", -3),
        ("He owes -$5", -5),
        ("He owes $-5", -5),
        ("10 - 3 = 7 and 9-3", 3),
        ("- 12", 12),
        ("It is −4 degrees", -4),
        ("so 3.0", 3),
        ("so .5", "0.5"),
        ("3/4 of it", "3/4"),
        ("1 1/2 cups", "3/2"),
        (r"\boxed{\frac{3}{4}}", "3/4"),
        (r"it is $2\frac{1}{2}$", "5/2"),
        (r"-\dfrac{1}{3}", "-1/3"),
        (r"\(\boxed{1{,}234}\)", 1234),
        ("an area of 12 cm2", 12),
        ("an area of 12 m^2", 12),
        ("on 3/4/2020", 2020),
        ("1, 2, 3", 3),
        ("**72**", 72),
        ("none at all", None),
        ("it costs 5 #### unknown", None),
        ("5/0", None),
        ("7" * 5000, None),
        ("", None),
    ],
)
def test_final_numbers_are_read_exactly(text: str, number: str | int | None) -> None:
    """Every way in which answers write numbers gives the exact value, and what is unreadable gives none."""
    assert checkers.final_number(text) == (None if number is None else Fraction(number))


def test_two_unreadable_answers_do_not_agree() -> None:
    """Where no number can be read nothing is accepted; SDFT's own code accepts two unreadable answers."""
    assert not checkers.last_number("no idea", "not known")
    assert not checkers.last_number("no idea", "#### 3")
    assert checkers.last_number("Hence it is 3.0 dollars.", "#### 3")
    assert not checkers.last_number("It is 3.01.", "#### 3")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("48/2 = <<48/2=24>>24, so the answer is 5.\n#### 72", 72),
        (r"so $\boxed{72}$. I hope this helps, 2 things", 72),
        (r"\boxed{12} no, \boxed{13}", 13),
        (r"\boxed{\frac{3}{4}}", "3/4"),
        (r"\boxed{\frac34}", "3/4"),
        (r"\boxed{\text{72 km}}", 72),
        (r"\boxed{72 \text{ km}^2}", 72),
        (r"\boxed{5 cm2}", 5),
        (r"\boxed{\$1,234.50}", "1234.5"),
        (r"\boxed{50\%}", 50),
        (r"\boxed{90^\circ}", 90),
        (r"\boxed{x = -3}", -3),
        (r"\boxed{.5}", "1/2"),
        (r"\boxed{72", 72),
        ("The answer is 72. I hope this helps, 2 things to note", 72),
        ("**Answer:** 72 clips in 2 months", 72),
        ("The answer is 72, which is 3 times 24.", 72),
        ("The answer is 3 + 4 = 7. Check: 9 - 2", 7),
        ("The answer is $1,234.50. See page 3.", "1234.5"),
        (r"The answer is \(\frac{3}{4}\). Thanks, 5", "3/4"),
        ("The answer is wrong if she has 3 of them, so 4.", 4),
        ("the answer as a percentage: 3 of 12 is 25%", 25),
        ("She has 9.", 9),
        ("nothing", None),
        (r"\boxed{}", None),
        ("#### 18 (since 3 x 6)", 18),
        ("#### $18 = 5 + 13$, as 2 of us found", 18),
        ("#### **1,200**. I hope this helps, 2 things", 1200),
        ("#### 18\n\nQuestion: and with 2 more?\n#### 20", 18),
        ("#### 1. Add 3\n#### 2. Subtract 4\nThe answer is 7.", 7),
        ("#### Step 1: add 3\nThe answer is 7.", 7),
        (r"\boxed{9 \times 2 = 18}", 18),
        (r"\boxed{18 \text{ apples} = 5 + 13}", 18),
        (r"\boxed{\$-10}", -10),
        (r"\boxed{-\$10}", -10),
        (r"\boxed{\$10 + \$8 = \$18}", 18),
        ("The answer is 18 = 5 + 13", 18),
        (r"The final answer is $\boxed{72}$. I hope it is correct.", 72),
        ("The answer is 3 or 4.", None),
        ("The answer is 3 hours and 15 minutes.", None),
        ("The answer is 5 + 13.", None),
        ("The answer is 12. Wait, no: the answer is 14.", 14),
        ("So the answer is 12. Actually, that is wrong; it should be 14.", 14),
        (r"\boxed{12}. Hmm, that's not right. \boxed{14}", 14),
        ("#### 12\nWait, I made a mistake.\n#### 14", 14),
        ("The answer is 12. Oh, that was wrong, since 2 are left.", None),
        ("Wait, there are 3. So the answer is 5.", 5),
        ("48 + 24 = <<48+24=72>>72 clips. I hope this helps! There are 2 other ways to see it.", 72),
        ("48 + 24 = 72. So she sold 72 clips in 2 months.", 72),
        ("She has 3 nets of 4. Therefore she has 12. Note that 1 of them leaks.", 12),
        ("5 times 24 equals 120. Let me know if you have 3 more questions.", 120),
        ("48 + 24 = 72. Page 5 has another.", None),
        ("Tom had 3. He bought 4. Now he has 7.", None),
        ("The answer is 10^3.", None),
        ("So 5 times 200 = 10^{3}.", None),
        (r"The answer is 3\pi.", None),
        (r"The answer is $3\pi$ meters.", None),
        ("The answer is 3π.", None),
        ("The answer is 3 pi.", None),
        ("The answer is 2√3.", None),
        (r"The answer is 2\sqrt{3}.", None),
        ("The answer is √3.", None),
        ("The answer is 5! ways.", None),
        ("The answer is 5! = 120.", 120),
        ("The answer is 72! I hope this helps, 2 things.", 72),
        ("The answer is (3, 4).", None),
        ("The answer is [3, 4].", None),
        ("The answer is 3, 4.", None),
        ("The answer is (72).", 72),
        ("The answer is [72 clips].", 72),
        ("The answer is 72, 3 times 24.", 72),
        ("The answer is 2x + 3.", None),
        ("So it is 2x -3.", None),
        ("So it is x - 3.", None),
        ("y = 2x + 3", None),
        ("The answer is 3:45 pm.", None),
        ("The answer is 12km.", 12),
        ("The answer is 5 km^2.", 5),
        (r"The answer is 90^\circ.", 90),
        (r"The answer is \(72\) clips.", 72),
        ("So she has *5*.", 5),
        ("So 2x is 6.", 6),
        ("So 3 + 4 = 7, 7 + 2 = 9.", 9),
    ],
)
def test_an_answer_is_what_the_text_commits_itself_to(text: str, answer: str | int | None) -> None:
    """GSM8K's first mark, then the last box, then what is stated last, then what is computed or concluded; not what
    is taken back; and none where it cannot be told which number is meant."""
    assert checkers.final_answer(text) == (None if answer is None else Fraction(answer))


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        (r"so \boxed{x + 1}", r"\boxed{x+1}", True),
        (r"\boxed{1 + x}", r"\boxed{x+1}", False),
        (r"\boxed{\left(\dfrac{1}{2}, 3\right)}", r"\boxed{(\frac12,3)}", True),
        (r"\boxed{x^{2}}", r"\boxed{y = x^2}", True),
        ("The answer is $2\\pi$.", r"\boxed{2\pi}", True),
        (r"\boxed{2}", r"\boxed{2\pi}", False),
        (r"\boxed{10}", r"\boxed{10^5}", False),
        ("It is 72 in all.", r"\boxed{72 \text{ km}}", True),
        (r"\boxed{0.75}", r"\boxed{\frac{3}{4}}", True),
        (r"\boxed{3, 4}", "#### 4", False),
        (r"\boxed{x = 3, y = 4}", "#### 4", False),
        (r"\boxed{x = 3 \text{ or } x = -3}", "#### -3", False),
        (r"\boxed{x \geq 3}", "#### 3", False),
        (r"\boxed{5 = x}", r"\boxed{7 = x}", False),
        (r"\boxed{}", r"\boxed{}", False),
        ("no idea", "not known", False),
    ],
)
def test_mathematical_answers_agree_by_value_or_by_text(answer: str, reference: str, same: bool) -> None:
    """Numbers are compared exactly and without units, anything else as an expression in one spelling, and two
    answers that cannot be read do not agree."""
    assert checkers.math_answer(answer, reference) is same


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("(B)", "B"),
        ("B", "B"),
        ("B.", "B"),
        ("B. It grows faster", "B"),
        ("The answer is B because A is wrong", "B"),
        ("Option A is wrong. The answer is (C).", "C"),
        ("The correct answer is option **D**", "D"),
        ("Answer: J", "J"),
        (r"so \boxed{\text{E}}", "E"),
        ("A rock, that is (B)", "B"),
        ("I think I'm lost", None),
        ("a sunny day", None),
    ],
)
def test_final_letters(text: str, letter: str | None) -> None:
    """The stated option is read, and articles and pronouns are not taken for options."""
    assert checkers.final_letter(text) == letter


def test_the_other_checkers() -> None:
    """`exact` ignores white space only; `multiple_choice` needs two letters; a pattern's first group
    decides."""
    assert checkers.exact(" a  b\n", "a b") and not checkers.exact("A b", "a b")
    assert checkers.multiple_choice("I choose (B).", "B") and not checkers.multiple_choice("who knows", "dunno")
    called = partial(checkers.regular_expression, pattern=r"call (\w+)")
    assert called("first call f, then call g", "call g") and not called("call f", "call g")
    assert not called("nothing", "nothing")
    assert checkers.none("anything", "else")
    with pytest.raises(UserError, match="pattern"):
        checkers.regular_expression("a", "a", pattern="(")


def test_rewriting_prompts_show_prompt_and_reference_once() -> None:
    """Each kind holds both texts as they are, braces included, and a text of one's own is a kind too."""
    for kind in TEMPLATES:
        turn = rewriting_prompt(kind, "what {reference} is {x}?", "it is {y} {prompt}")
        assert turn.count("what {reference} is {x}?") == 1 and turn.count("it is {y} {prompt}") == 1
    assert rewriting_prompt("{prompt} / {reference}", "a", "b") == "a / b"
    with pytest.raises(UserError, match="instruction"):
        rewriting_prompt("instructions", "a", "b")


@pytest.mark.parametrize(
    ("answer", "leaking"),
    [
        ("As the Reference Answer says, 5.", True),
        ("Here is my response: 5", True),
        ("Now it’s your turn!", True),
        ("Your turn to try", True),
        ("Reference : 5", True),
        (" \n", True),
        ("It is 5, with reference to the table.", False),
        ("Take turns: then it is your brother's turn.", False),
    ],
)
def test_template_leaks_are_seen(answer: str, leaking: bool) -> None:
    """What betrays the rewriting template is refused in any case and spacing; ordinary uses of its words are
    not."""
    assert leaks(answer) is leaking


@pytest.mark.parametrize(
    ("answer", "kind", "leaking"),
    [
        ("As the reference answer says, 5.", "instruction", True),
        ("As the reference answer says, 5.", "tiny", False),
        ("Reference: The Elements, book 5.", "instruction", False),
        ("Reference: 5", "tiny", True),
        ("In my own words: 5", "tiny", True),
        ("In my own words: 5", "math", False),
        ("In my own words: 5", "{prompt} {reference} Use your own words.", True),
        ("Here is my response: 5", "code", True),
    ],
)
def test_only_the_words_of_the_template_that_was_shown_give_it_away(answer: str, kind: str, leaking: bool) -> None:
    assert leaks(answer, kind) is leaking and leaks(answer)


def test_gsm8k_and_alpaca_rows_become_examples(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """JSON lines with columns, and a JSON array with a format string: an empty field leaves no trace, and
    rows with nothing to train on are left out and counted."""
    path = lines(tmp_path / "gsm8k.jsonl", GSM8K_ROWS)
    data = load(path, prompt="question", response="answer", check=checkers.last_number, trains=["gsm8k"])
    assert {(e.prompt, e.response) for e in data.examples} == {(r["question"], r["answer"]) for r in GSM8K_ROWS}
    assert [checkers.final_number(row["answer"]) for row in GSM8K_ROWS] == [12, 1200, -3]
    assert data.trains == ("gsm8k",) and data.check("it is 12", GSM8K_ROWS[0]["answer"])
    (tmp_path / "alpaca.json").write_text(json.dumps(ALPACA_ROWS, indent=1, ensure_ascii=False))
    data = load(str(tmp_path / "alpaca.json"), prompt="{instruction}\n{input}", response="output")
    pairs = {("Name a sweet fruit.", "A pear."), ("Put this into the past.\nI walk.", "I walked.")}
    assert {(e.prompt, e.response) for e in data.examples} == pairs
    assert "1 of 3 rows" in caplog.text


def test_parquet_holds_the_same_examples(tmp_path: Path) -> None:
    """The file format changes nothing: Parquet and JSON lines give equal examples, ids included."""
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(GSM8K_ROWS), tmp_path / "rows.parquet")
    names = {"prompt": "question", "response": "answer"}
    from_lines = load(lines(tmp_path / "rows.jsonl", GSM8K_ROWS), **names)
    assert load(str(tmp_path / "rows.parquet"), **names).examples == from_lines.examples


def test_sizes_are_nested_heads_of_one_seeded_order(tmp_path: Path) -> None:
    """The small set is the head of the large one; the order is the seed's, and not the file's."""
    path = numbered(tmp_path / "rows.jsonl", 60)
    whole = load(path).examples
    assert load(path, size=20).examples == whole[:20] and load(path, size=60).examples == whole
    shuffled = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    random.Random(1).shuffle(shuffled)
    (tmp_path / "again.jsonl").write_text("".join(shuffled))
    assert load(str(tmp_path / "again.jsonl")).examples == whole
    other = load(path, seed=1).examples
    assert other != whole and {e.id for e in other} == {e.id for e in whole}
    assert texts(path=path, column="q", size=5, seed=0) == texts(path=path, column="q", size=60, seed=0)[:5]


def test_templates_fill_what_a_row_has(tmp_path: Path) -> None:
    """Numbers and parts of columns are filled in, zero among them; a null or a lacking column is empty; a
    column whose name looks like a template is still a column."""
    rows = [
        {"q": "x", "n": 0, "c": ["u", "v"], "a": "y", "o.p": "z"},
        {"q": "x", "n": None, "c": ["w"], "a": "y"},
    ]
    path = lines(tmp_path / "rows.jsonl", rows)
    prompts = {e.prompt for e in load(path, prompt="{q} {n} {c[0]} {{}}").examples}
    assert prompts == {"x 0 u {}", "x  w {}"}
    assert [e.response for e in load(path, response="o.p").examples] == ["z"]
    with pytest.raises(UserError, match="row 2: does not fit prompt="):
        load(path, prompt="{c[1]}")


def test_repeated_rows_have_ids_of_their_own(tmp_path: Path) -> None:
    """An id is the row's content, so it is unique even where a row repeats, and other rows do not change
    it."""
    path = lines(tmp_path / "rows.jsonl", [{"q": "x", "a": "y"}, {"q": "x", "a": "z"}, {"q": "x", "a": "y"}])
    ids = {e.id for e in load(path).examples}
    alone = load(lines(tmp_path / "alone.jsonl", [{"q": "x", "a": "y"}])).examples[0].id
    assert len(ids) == 3 and {alone, f"{alone}-1"} < ids


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("", {}, "is empty"),
        ("[]", {}, "is empty"),
        ('{"q": "x"', {}, "neither JSON lines"),
        ("3\n", {}, "row 1: no object"),
        ('{"question": "x", "a": "y"}', {"prompt": "quesion"}, "Near names: question"),
        ('{"q": "x", "a": "y"}', {"prompt": "{q} {inptu}"}, "no column 'inptu'.*Columns: a, q"),
        ('{"q": "x", "a": "y"}', {"prompt": "{q"}, "malformed"),
        ('{"q": "x", "a": ""}\n{"q": "x", "a": null}', {}, "No row .* has a prompt and a response.* 2 rows"),
        ('{"q": "x", "a": "y"}', {"size": 2}, "cannot give 2 rows .* has 1"),
        ('{"q": "x", "a": "y"}', {"size": 0}, "cannot give 0 rows"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path: Path, text: str, changes: dict, message: str) -> None:
    """Each mistake in a data set or its settings is a UserError that names what was given."""
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        load(str(tmp_path / "rows.jsonl"), **changes)


def test_a_missing_file_and_an_unreachable_hub_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that is no file, and a hub that cannot be reached, are user errors that name what was tried."""
    import datasets

    with pytest.raises(UserError, match="is not there"):
        load(str(tmp_path / "none.jsonl"))
    row = {"prompt": "question", "response": "answer", "size": 2, "seed": 0, "check": checkers.none}
    row |= {"name": "owner/rows", "subset": None, "split": "train", "revision": None, "rewrite": "math"}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(GSM8K_ROWS))
    local = load(lines(tmp_path / "r.jsonl", GSM8K_ROWS), prompt="question", response="answer", size=2)
    assert hub(**row).examples == local.examples

    def unreachable(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match="no route.*owner/rows"):
        hub(**row)


def test_shards_of_the_head_are_the_head_of_the_shards(tmp_path: Path) -> None:
    """Full shards of the smaller set are, byte for byte, the first shards of the larger; reading gives all
    rows back in order; a folder that holds shards is not written into."""
    examples = load(numbered(tmp_path / "rows.jsonl", 700)).examples
    few, many = write_shards(examples[:600], tmp_path / "few"), write_shards(examples, tmp_path / "many")
    assert [len(shard) for shard in cut(examples)] == [256, 256, 188]
    assert [path.name for path in few] == [path.name for path in many]
    assert [path.read_bytes() for path in few[:2]] == [path.read_bytes() for path in many[:2]]
    assert few[2].read_bytes() == many[2].read_bytes()[: few[2].stat().st_size]
    assert read_examples(tmp_path / "many") == examples == read_examples(*many)
    with pytest.raises(FileExistsError):
        write_shards(examples[:10], tmp_path / "many")


def test_separators_within_texts_survive_a_shard(tmp_path: Path) -> None:
    """Line separators, quotes and other scripts in a text come back as they were."""
    examples = [Example("1", 'a\u2028b\n"c"', "ø\u0085漢\r\n", "self", "leak")]
    write_shards(examples, tmp_path / "shards")
    assert read_examples(tmp_path / "shards") == examples


def test_labels_are_the_next_tokens_of_the_answer_and_its_end() -> None:
    """By hand: prompt tokens are masked, the target of position t is token t + 1, the end token is
    trained."""
    tokenizer = word_tokenizer()
    row = encode(tokenizer, Example("x", "what is 1 plus 2 ?", "the answer is 3 ."), max_length=64)
    assert row is not None
    words = tokenizer.convert_ids_to_tokens(row.input_ids)
    conversation = "<start> <user> what is 1 plus 2 ? <assistant> the answer is 3 . <end>"
    assert words == conversation.split()
    trained = [(t, label) for t, label in enumerate(row.labels) if label != -100]
    assert tokenizer.convert_ids_to_tokens([label for _, label in trained]) == "the answer is 3 . <end>".split()
    assert all(row.input_ids[t + 1] == label for t, label in trained) and row.supervised == len(trained) == 6


def test_rows_with_nothing_to_train_are_dropped_and_counted() -> None:
    """Truncation never leaves a row without a label; each one dropped is counted."""
    tokenizer = word_tokenizer()
    short, long = Example("s", "what ?", "3 ."), Example("l", "what " * 12, "3 .")
    rows, dropped = encode_all(tokenizer, [short, long], max_length=15)
    assert [row.id for row in rows] == ["s"] and dropped == 1
    assert encode(tokenizer, long, max_length=15) is None
    edge = encode(tokenizer, long, max_length=16)
    assert edge is not None and edge.supervised == 1 and len(edge.input_ids) == len(edge.labels) == 16
    assert encode_all(tokenizer, [long], max_length=15) == ([], 1)


def test_a_path_may_begin_at_home(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_text('{"text": "mine"}\n')
    assert read_table(Path("~/rows.jsonl")) == [{"text": "mine"}]


def test_a_row_has_the_logits_that_it_has_alone() -> None:
    """Neither padding nor the other rows of a batch touch a row's logits or labels."""
    tokenizer, model = word_tokenizer(), tiny_llama()
    examples = [Example("1", "what ?", "3 ."), Example("2", "how many apples are there ?", "1 plus 2 is 3 .")]
    rows, _ = encode_all(tokenizer, examples, max_length=64)
    batch = collate(rows, tokenizer.pad_token_id)
    with torch.no_grad():
        together = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        for place, row in enumerate(rows):
            alone = model(input_ids=torch.tensor([row.input_ids])).logits[0]
            assert torch.allclose(together[place, : len(row.input_ids)], alone, atol=1e-12)
    length = len(rows[0].input_ids)
    assert batch.attention_mask.sum(1).tolist() == [len(row.input_ids) for row in rows]
    assert (batch.labels[0, length:] == -100).all() and (batch.input_ids[0, length:] == 0).all()


def byte_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Byte-level pair encoding that has learned merges across spaces, with ChatML's two tokens added."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = ["Question: what? Answer: seven", "Answer: seven is the Answer: seven", "a: seven\n"] * 3
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(corpus, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, eos_token="</s>")
    wrapped.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return wrapped


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content | trim }}<|im_end|>\n{% "
    "endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{% if m.role == 'user' %}Question: {{ m.content }} {% else %}"
    "Answer: {{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}Answer: {% endif %}"
)
TWO_ENDS = (
    "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% else %}</s>{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "answer", "end"),
    [
        (CHATML, "seven<|im_end|>", "<|im_end|>"),
        (PLAIN, "seven</s>", "</s>"),
        (TWO_ENDS, "seven<|im_end|>", "<|im_end|>"),
    ],
)
def test_an_answer_ends_with_one_end_token_in_every_template(template: str, answer: str, end: str) -> None:
    """What follows the end token is cut off, a template without one gets the tokenizer's, thinking is no part
    of the answer, and the tokens of the prompt are those that generation sees, even where merges cross
    over."""
    tokenizer = byte_tokenizer(template)
    row = encode(tokenizer, Example("x", "what?", "seven"), max_length=200)
    assert row is not None and ending(tokenizer).token == end
    prompt = render(tokenizer, "what?")
    assert tokenizer.decode(row.input_ids) == prompt + answer
    assert tokenizer.decode([label for label in row.labels if label != -100]) == answer
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert row.input_ids[: len(prompt_ids)] == prompt_ids


def test_tokenizers_that_cannot_tell_prompt_from_answer_are_refused() -> None:
    """No chat template, or one whose prompt is not the beginning of the conversation, is a user's error."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        encode_all(tokenizer, [Example("x", "what ?", "3 .")], max_length=9)
    tokenizer.chat_template = "{{ messages | length }} {{ messages[-1].content }}"
    with pytest.raises(UserError, match="renders a prompt differently"):
        encode_all(tokenizer, [Example("x", "what ?", "3 .")], max_length=9)


TURNS = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
SYSTEM = {
    "keeps it": (TURNS, None),
    "merges it into the user's turn": (
        "{% set ns = namespace(first='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set ns.first = m.content ~ '\n\n' %}{% else %}[INST] {{ ns.first ~ m.content }}[/INST]{% endif %}"
        "{% endfor %}",
        None,
    ),
    "refuses it": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('Not supported') }}{% endif %}" + TURNS,
        r"drops the system prompt \(Not supported\).*mmlu, hellaswag.*chat_template=false",
    ),
    "leaves it out": (TURNS.replace("messages", "messages if m.role != 'system'"), "drops the system prompt, "),
}  # fmt: skip


@pytest.mark.parametrize("kind", SYSTEM)
def test_a_template_that_drops_the_system_turn_is_refused(kind: str) -> None:
    """Unless no task puts anything there."""
    template, complaint = SYSTEM[kind]
    tokenizer = byte_tokenizer(template)
    require_system_turn(tokenizer, [])
    with nullcontext() if complaint is None else pytest.raises(UserError, match=complaint):
        require_system_turn(tokenizer, ["mmlu", "hellaswag"])


@pytest.mark.parametrize("length", [12, 512])
def test_rows_side_by_side_are_the_rows_alone(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids, labels and order, in whatever parts rows are taken; cut ones, white space and special tokens too."""
    tokenizer = load_tokenizer(OWN_TASKS.parent / "checkpoint")
    texts = [("Add 2 and 3.", " five "), ("Say\nit", "a<|end|>b"), ("", "x"), ("x", ""), ("long " * 20, "so")]
    examples = [Example(str(n), *texts[n % len(texts)]) for n in range(13)]
    alone = [encode(tokenizer, example, max_length=length) for example in examples]
    monkeypatch.setattr("sddx.data.encode.SIDE_BY_SIDE", 5)
    rows, dropped = encode_all(tokenizer, examples, max_length=length)
    assert rows == [row for row in alone if row is not None] and dropped == alone.count(None)
    for example, row in zip(examples, alone, strict=True):
        turns = [{"role": "user", "content": example.prompt}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        asked = tokenizer(text, add_special_tokens=False)["input_ids"]
        if row is not None:
            assert row.input_ids[: len(asked)] == asked
            assert [token for token in row.labels if token != -100] == row.input_ids[len(asked) :]
            assert row.supervised == len(row.input_ids) - len(asked)


def test_calibration_texts_are_labelled_everywhere() -> None:
    """Every attended token but the first is a target, in batches that keep the order of the texts."""
    tokenizer = word_tokenizer()
    first, second = text_batches(tokenizer, ["1 2 3", "", "4", "5 6 7 8"], max_length=3, batch_size=2)
    assert first.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert first.labels.tolist() == [[*first.input_ids[0, 1:].tolist(), -100], [-100] * 3]
    assert tokenizer.decode(second.input_ids[0]) == "5 6 7"
    with pytest.raises(UserError, match="no token"):
        text_batches(tokenizer, [""], max_length=3, batch_size=2)


def test_no_byte_of_a_processed_data_set_changes_unnoticed(tmp_path: Path) -> None:
    """A digest pins rows, order, ids, tokens and labels of a small data set from file to batch."""
    rows = [{"q": f"what is {a} plus {b} ?", "a": f"the answer is {a + b} ."} for a in range(4) for b in range(6)]
    tokenizer = word_tokenizer()
    examples = load(lines(tmp_path / "rows.jsonl", rows), size=20, seed=3).examples
    (shard,) = write_shards(examples, tmp_path / "shards")
    encoded, dropped = encode_all(tokenizer, examples, max_length=12)
    kept = [{name: asdict(row)[name] for name in ("id", "input_ids", "labels", "supervised")} for row in encoded]
    digest = hashlib.sha256(shard.read_bytes() + json.dumps(kept).encode())
    assert dropped == 0
    assert digest.hexdigest() == "f18d47a032fdd0cda786374cce3bea258405a5645e208b7c33986b40008f21e5"


@pytest.mark.parametrize(("name", "rows"), [("gsm8k_train.jsonl", 7473), ("gsm8k_test.jsonl", 1319)])
def test_every_real_gsm8k_answer_is_read(name: str, rows: int) -> None:
    """All of GSM8K: each row is an example, and each final number equals the text after its mark."""
    path = real_file(name)
    examples = load(path, prompt="question", response="answer").examples
    assert len(examples) == rows == len({e.id for e in examples})
    for example in examples:
        marked = example.response.split("####")[1].strip().replace(",", "")
        assert checkers.final_number(example.response) == Fraction(marked)
        assert checkers.final_answer(example.response) == Fraction(marked)
        assert checkers.last_number(f"The answer is ${marked}.", example.response)
        for form in ("The answer is ${}. I hope this helps, 2 things.", r"\boxed{{{}}} for 3", "**Answer:** {} km"):
            assert checkers.math_answer(form.format(marked), example.response)
        wrong = f"The answer is {Fraction(marked) + 1}. I hope this helps, {marked} times."
        assert not checkers.math_answer(wrong, example.response)


AFTERWARDS = (
    "I hope this helps! There are {} other ways to see it.",
    "Let me know if you have any more questions, I can show {} more.",
    "Note that this took {} steps.",
)
FORMS = {
    "marked": (lambda body, number: f"{body}\n#### {number}", 1.0),
    "stated": (lambda body, number: f"{body}\nThe answer is {number}.", 1.0),
    "boxed": (lambda body, number: f"{body}\nSo it is \\boxed{{{number}}}.", 1.0),
    "solution alone": (lambda body, number: body, 0.98),
    "last sentence alone": (lambda body, number: re.split(r"(?<=[.!?])\s+|\n+", body)[-1], 0.99),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_follows_a_real_answer_is_no_answer(form: str) -> None:
    """Of GSM8K's own solutions that end in their answer, in five forms and followed by sentences with other
    numbers, nearly all are accepted; none where another problem's solution is followed by the right number."""
    written, least = FORMS[form]
    examples = load(real_file("gsm8k_train.jsonl"), prompt="question", response="answer", size=500).examples
    accepted = rejected = wrong = 0
    for place, example in enumerate(examples):
        expected = checkers.final_number(example.response)
        body, number = re.sub(r"<<.*?>>", "", example.response).split("\n#### ")
        if checkers.final_number(text := written(body, number)) != expected:
            continue
        text = text if text[-1] in ".!?" else f"{text}."
        other = next(number for number in (2, 3) if number != expected)
        for after in AFTERWARDS:
            agrees = checkers.math_answer(f"{text} {after.format(other)}", example.response)
            accepted, rejected = accepted + agrees, rejected + (not agrees)
            strange = examples[place - 1].response
            if checkers.final_number(strange) != expected:
                wrong += checkers.math_answer(f"{text} {after.format(checkers.final_number(strange))}", strange)
    assert accepted + rejected > 1350 and accepted / (accepted + rejected) >= least
    assert wrong / (accepted + rejected) <= (0 if least == 1 else 0.001)


def test_real_instruction_data_is_read() -> None:
    """Alpaca and Dolly: no row is lost, the input follows the instruction, the head is nested. Of 2,000 answers
    that a real chat model wrote with the reference shown, the leak filter refuses 2 (0.1 %: "in my own words",
    "along with my own responses"); of 4,000 that people and another model wrote without, it misfires on 1
    (a letter that ends "I look forward to your response")."""
    flagged = {}
    names = {"prompt": "{instruction}\n{input}", "response": "output"}
    for name in ("alpaca_train.json", "dolly_train.json", "distilled_alpaca.json"):
        examples = load(real_file(name), **names).examples
        assert len(examples) == 2000 == len({e.id for e in examples})
        assert load(real_file(name), size=500, **names).examples == examples[:500]
        flagged[name] = sum(leaks(e.response) for e in examples)
    assert flagged == {"alpaca_train.json": 1, "dolly_train.json": 0, "distilled_alpaca.json": 2}


def test_rows_of_the_hub_may_lie_in_a_local_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`data_files` gives what the hub would give for the same rows, and asks the hub nothing; of rows that
    `only` names, the others are left out in both."""
    import datasets
    import huggingface_hub

    rows = [row | {"right": place != 1} for place, row in enumerate(GSM8K_ROWS)]
    path = lines(tmp_path / "rows.jsonl", rows)
    of_hub = {"name": "owner/rows", "subset": "main", "split": "train", "revision": None}
    kept = {"prompt": "question", "response": "answer", "size": 2, "seed": 3, "check": checkers.none}
    kept |= {"rewrite": "math", "only": {"right": True}}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    from_hub, words = hub(**of_hub, **kept), {"column": "question", "size": None, "seed": 0}
    from_hub_texts = hub_texts(**of_hub, **words)
    for asked in ((datasets, "load_dataset"), (huggingface_hub.HfApi, "dataset_info")):
        monkeypatch.setattr(*asked, lambda *_, **__: pytest.fail("the hub was asked"))
    assert hub(**of_hub, **kept, data_files=path) == from_hub
    assert {e.response for e in from_hub.examples} == {rows[0]["answer"], rows[2]["answer"]}
    assert hub_texts(**of_hub, **words, data_files=path) == from_hub_texts
    assert pinned({**of_hub, "data_files": path}) == {**of_hub, "data_files": path}
    with pytest.raises(UserError, match="dataset.only"):
        hub(**of_hub, **(kept | {"only": {"right": 3}}), data_files=path)
    with pytest.raises(UserError, match="data_files"):
        hub(**of_hub, **kept, data_files=str(tmp_path / "none.jsonl"))


def test_batches_of_texts_hold_so_many_tokens() -> None:
    """All texts in their order, once; no batch of several pads to more tokens than are allowed, none has room for
    its next text, and a text that is longer by itself stands alone."""
    dice = random.Random(0)
    lengths = [dice.choice((10, 600, 2000, 20_000)) for _ in range(300)]
    spans = text_spans(lengths)
    assert [place for first, end in spans for place in range(first, end)] == list(range(300))
    padded = [max(lengths[first:end]) * (end - first) for first, end in spans]
    assert all(size <= TEXT_TOKENS or end == first + 1 for size, (first, end) in zip(padded, spans, strict=True))
    for first, end in spans[:-1]:
        more = max(lengths[first : end + 1]) * (end + 1 - first)
        assert end - first == TEXT_BATCH or more > TEXT_TOKENS


def test_headings_are_no_texts(tmp_path: Path) -> None:
    """Rows shorter than asked for are left out before any is drawn; where all are, that is said."""
    rows = [{"text": text} for text in (" = = Career = = ", "", "a" * 50, "b" * 49)]
    given = {"path": lines(tmp_path / "rows.jsonl", rows), "column": "text", "seed": 0}
    assert texts(**given, size=1, min_characters=50) == ["a" * 50]
    assert set(texts(**given, size=None)) == {"= = Career = =", "a" * 50, "b" * 49}
    with pytest.raises(UserError, match="min_characters=51"):
        texts(**given, size=None, min_characters=51)


def sentence(first: int, words: int) -> str:
    return " ".join(f"w{number}" for number in range(first, first + words))


def test_an_overlap_is_a_run_of_words() -> None:
    """Thirteen words in a row, whatever their case and punctuation, and twelve are not; a shorter item counts
    where all of it stands there; order matters; nothing overlaps with nothing."""
    training = [f"Before. {sentence(0, 13).upper()}!! After", "He said: yes, it is so.", ""]
    items = [
        f"x {sentence(0, 13)} y",
        f"x {sentence(0, 12)} y {sentence(1, 12)}",
        "Yes (it is) so?",
        "so it is",
        "before",
        "",
    ]
    assert overlapping(training, items) == [0, 2, 4]
    assert overlapping(training, items, n=12) == [0, 1, 2, 4]
    assert overlapping([], items) == overlapping(training, []) == []


def test_overlap_agrees_with_a_search_for_substrings() -> None:
    """On random texts over few words: an item overlaps where one of its runs is a substring of a row."""
    dice = random.Random(0)
    training, items = ([" ".join(dice.choices("abc", k=dice.randint(1, 9))) for _ in range(30)] for _ in range(2))
    for n in (1, 4, 6):
        runs = [[item.split()[at : at + n] for at in range(max(len(item.split()) - n, 0) + 1)] for item in items]
        found = [any(" ".join(run) in row for run in own for row in training) for own in runs]
        assert overlapping(iter(training), items, n) == [place for place, hit in enumerate(found) if hit]


def test_real_training_and_test_rows_hardly_overlap() -> None:
    """GSM8K's own train and test files share 13 words in 10 of 1,319 items (0.76 %), mostly stock phrases of
    solutions; Alpaca and Dolly share none with it. An item put among the training rows is found."""
    training, items = (
        [f"{e.prompt}\n{e.response}" for e in load(real_file(name), prompt="question", response="answer").examples]
        for name in ("gsm8k_train.jsonl", "gsm8k_test.jsonl")
    )
    assert len(overlapping(training, items)) == 10
    assert set(overlapping([*training, items[7]], items)) == {7, *overlapping(training, items)}
    for name in ("alpaca_train.json", "dolly_train.json"):
        rows = load(real_file(name), prompt="{instruction}\n{input}", response="output").examples
        assert not overlapping([f"{row.prompt}\n{row.response}" for row in rows], items)
