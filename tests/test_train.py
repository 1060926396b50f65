"""The main job as a user runs it, small: from the command line's settings to summary.json and back."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from composing import SMALL, composed, resolve
from forked import command
from huggingface_hub import HfApi
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, LlamaConfig

import sddx
from sddx.commands.compare import main as compare
from sddx.data.shards import write_rows
from sddx.errors import UserError
from sddx.evaluation.tasks import OWN_TASKS
from sddx.records import ROLES, Artifact, Example
from sddx.report import table
from sddx.stages.prune.check import _check_family
from sddx.stages.score.check import _check_measured
from sddx.train import look, run, verify

pytestmark = [pytest.mark.runs, pytest.mark.usefixtures("quick_groups")]

CHECKPOINT = Path(sddx.__file__).parent / "tiny" / "checkpoint"


def job(out: Path, store: Path, *overrides: str, config_dir: Path | None = None) -> dict:
    """One run; returns its summary."""
    with composed(*SMALL, f"store={store}", *overrides, out=out, config_dir=config_dir) as cfg:
        return json.loads(run(resolve(cfg), out).read_text())


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, shared_store: Path) -> tuple[Path, Path, dict]:
    """A finished run: its folder, its store, its summary."""
    out = tmp_path_factory.mktemp("first")
    return out, shared_store, job(out, shared_store, "wandb.mode=offline", "loss=sdd_squarehead")


def test_the_summary_says_all_that_was_promised(first: tuple[Path, Path, dict]) -> None:
    out, _, summary = first
    promised = (
        "recovery recovery_low recovery_high recovery_trained recovery_held_out gap_closed pruned_recovery "
        "scores cut parameters supervised_tokens steps fallback_share seconds peak_memory artifacts choices "
        "versions overlap"
    ).split()
    assert set(promised) <= summary.keys()
    assert all(summary["scores"][model].keys() >= {"tiny_facts", "average"} for model in summary["scores"])
    assert len(summary["cut"]) == 9 and summary["parameters"]["pruned"] < summary["parameters"]["unpruned"]
    assert summary["steps"] == 6 and summary["examples"] == 48
    assert summary["trained"] == ["tiny_arithmetic"]
    assert {path.name for path in out.iterdir()} >= {"config.yaml", "summary.json", "table.md", "metrics.csv"}


def test_metrics_reach_csv_and_wandb(first: tuple[Path, Path, dict]) -> None:
    out, _, _ = first
    names = {row["name"] for row in csv.DictReader((out / "metrics.csv").open())}
    assert {"train/loss", "train/squarehead", "train/learning_rate", "validation/loss"} <= names
    assert len(list(out.glob("wandb/offline-run-*/*.wandb"))) == 1


def test_training_rows_that_stand_in_the_evaluation_are_told(
    first: tuple[Path, Path, dict], tmp_path: Path
) -> None:
    """An evaluation item among the training rows: one of its task's items overlaps; the others are as before. The
    stage looks at the same items as the evaluation, and the table says so."""
    from sddx.evaluation.harness import task_texts
    from sddx.runtime import Runtime
    from sddx.stages.overlap.run import overlap

    _, store, summary = first
    found = summary["overlap"]["tasks"]
    assert {task: record["items"] for task, record in found.items()} == {"tiny_arithmetic": 6, "tiny_facts": 6}
    texts = task_texts(["tiny_arithmetic", "tiny_facts"], None, 6, None)
    rows = Path(next(store.glob(f"prepare/*/{summary['artifacts']['prepare']}")))
    shutil.copytree(rows, tmp_path / "rows")
    question, answer = texts["tiny_facts"][2].split("\n", 1)
    write_rows([Example("x", question, answer)], tmp_path / "rows" / "shards" / "shard-00099.jsonl")
    settings = {"tasks": list(texts), "include": None, "limit": 6, "split": None, "runtime": Runtime(quiet=True)}
    overlap(tmp_path, data=[Artifact("prepare", "key", tmp_path / "rows")], files=[], **settings)
    told = json.loads((tmp_path / "overlap.json").read_text())
    assert told["tasks"]["tiny_facts"]["overlapping"] == found["tiny_facts"]["overlapping"] + 1
    assert told["tasks"]["tiny_arithmetic"] == found["tiny_arithmetic"]
    shown = dict(table.lines(summary | {"overlap": told}))["overlap with training rows"]
    assert "tiny_facts 16.7 %" in shown and "13 words" in shown


def test_strict_and_flexible_scores_stand_under_the_table(first: tuple[Path, Path, dict]) -> None:
    """Of every model, from its answers themselves; the task of choices is not among them."""
    out, store, summary = first
    expected: dict[str, list[str]] = {"flexible (primary)": [], "strict": []}
    for model in ROLES:
        (place,) = store.glob(f"evaluate/*/{summary['artifacts'][f'evaluate_{model}']}")
        samples = json.loads((place / "results.json").read_text())["tasks"]["tiny_arithmetic"]["samples"]
        answers = [sample["answers"] for sample in samples]
        for name, texts in expected.items():
            by = name.split()[0]
            score = sum(sample["metrics"][f"exact_match,{by}"] for sample in samples) / 6
            unparsed = sum(answer[by] == "[invalid]" for answer in answers) / 6
            texts.append(f"{model} {100 * score:.1f} % ({100 * unparsed:.1f} % unparsed)")
    lines = [f"- tiny_arithmetic, exact_match,{name}: {', '.join(texts)}" for name, texts in expected.items()]
    assert [line for line in (out / "table.md").read_text().splitlines() if "exact_match" in line] == lines


def test_the_same_command_again_builds_nothing_and_has_its_curves(
    first: tuple[Path, Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stage is found; the rows that training logged are logged again."""
    out, store, summary = first

    def refuse(*arguments: object) -> None:
        raise AssertionError("a stage was built again")

    monkeypatch.setattr("sddx.store._make", refuse)
    again = job(tmp_path, store, "loss=sdd_squarehead")
    assert again["artifacts"] == summary["artifacts"] and again["scores"] == summary["scores"]
    assert (tmp_path / "metrics.csv").read_text() == (out / "metrics.csv").read_text()


def test_another_arm_and_seed_share_what_they_can(first: tuple[Path, Path, dict], tmp_path: Path) -> None:
    """Only what the change can reach is built anew; the comparison of the two runs is on the same items."""
    out, store, summary = first
    other = job(tmp_path, store, "loss=sft", "seed=1")
    same = {stage for stage, key in summary["artifacts"].items() if other["artifacts"].get(stage) == key}
    assert same == {"model", "prepare", "score", "prune", "evaluate_unpruned", "evaluate_pruned", "overlap"}
    assert other["fallback_share"] is None and 0 <= summary["fallback_share"] <= 1
    compare([str(out), str(tmp_path)])


def test_settings_that_change_no_number_change_no_key(first: tuple[Path, Path, dict], tmp_path: Path) -> None:
    """How a training is run, budgets that do not count, engines that are not used, and the fallback where nothing
    is written: a run that differs in them alone builds nothing."""
    asked = ("loss=sft", "trainer.budget=steps", "trainer.steps=2")
    idle = (
        "trainer.checkpoint_every=7", "trainer.log_every=2", "trainer.epochs=9", "trainer.tokens=99",
        "trainer.gradient_checkpointing=true", "selfdata.fallback=drop", "evaluation.vllm.python=/no/python",
    )  # fmt: skip
    one, other, longer = (
        job(tmp_path / name, first[1], *asked, *more)["artifacts"]
        for name, more in (("one", ()), ("other", idle), ("longer", ("trainer.steps=3",)))
    )
    assert other == one and longer["train"] != one["train"]


def test_no_row_need_be_held_out(first: tuple[Path, Path, dict], tmp_path: Path) -> None:
    summary = job(tmp_path, first[1], "validation=0", "trainer.budget=steps", "trainer.steps=2")
    assert summary["steps"] == 2 and summary["examples"] == 16


def test_metrics_that_choose_the_same_blocks_share_all_that_follows(
    first: tuple[Path, Path, dict], tmp_path: Path
) -> None:
    """Whoever asks second trains and judges nothing; a run is still known by its own metric."""
    asked = ("loss=sft", "pruning.remove=2", "trainer.budget=steps", "trainer.steps=2")
    one, other = (
        job(tmp_path / metric, first[1], f"pruning={metric}", *asked)
        for metric in ("block_influence", "relative_l2")
    )
    assert one["cut"] == other["cut"] and one["choices"]["pruning"] != other["choices"]["pruning"]
    differing = {stage for stage, key in one["artifacts"].items() if other["artifacts"][stage] != key}
    assert differing == {"score", "prune"}


@pytest.mark.parametrize("loss", ["sdd", "sdd_plain", "squarehead", "squarehead_token", "sdd_kd"])
def test_every_other_arm_runs_whole(loss: str, first: tuple[Path, Path, dict], tmp_path: Path) -> None:
    """Each arm trains on its own data with its own terms, and is a run of its own."""
    summary = job(tmp_path, first[1], f"loss={loss}", "trainer.budget=steps", "trainer.steps=2")
    assert summary["steps"] == 2 and summary["artifacts"]["train"] != first[2]["artifacts"]["train"]
    assert (summary["fallback_share"] is None) == loss.startswith("squarehead")


def test_without_training_the_pruned_model_is_what_is_left(first: tuple[Path, Path, dict], tmp_path: Path) -> None:
    """loss=none: no rows, no student, nothing called recovered; the cut is that of the arms, and its curve is what
    the pruned model keeps."""
    summary = job(tmp_path, first[1], "loss=none", "evaluation.chat_template=false")
    assert not {"prepare", "distill", "train", "overlap"} & set(summary["artifacts"])
    assert summary["artifacts"]["prune"] == first[2]["artifacts"]["prune"]
    assert list(summary["scores"]) == ["unpruned", "pruned"] and summary["steps"] == 0
    assert summary["recovery"] is None and summary["pruned_recovery"] is not None
    assert "| pruned | kept |" in (tmp_path / "table.md").read_text()
    model, _ = sddx.load(tmp_path / "summary.json")
    assert len(model.model.layers) == 9 and not hasattr(model, "peft_config")


@pytest.mark.parametrize("units", ["blocks", "sublayers", "attention"])
def test_everything_can_be_removed(units: str, first: tuple[Path, Path, dict], tmp_path: Path) -> None:
    """The end of a depth curve. Without blocks the head sees the token itself: a text's perplexity is that of the
    embedding and the head alone."""
    remove = f"pruning.remove={24 if units == 'sublayers' else 12}"
    summary = job(tmp_path, first[1], "loss=none", "pruning=block_influence", f"pruning.units={units}", remove)
    assert summary["cache_bytes"]["pruned"] == 0
    model, _ = sddx.load(tmp_path / "summary.json")
    if units != "attention":
        ids = torch.tensor([[5, 7, 9]])
        alone = model.lm_head(model.model.norm(model.model.embed_tokens(ids)))
        assert summary["depth"] == "0L" and torch.equal(model(ids).logits, alone)


CUTS = {
    "attention, a patch that learns": (
        ["pruning=block_influence", "pruning.units=attention", "pruning/patch=mean", "pruning.patch.trained=true"],
        "12L-3A",
    ),
    "both kinds of branch, all weights": (
        ["pruning=relative_l2", "pruning.units=sublayers", "tuning=full", "trainer.learning_rate=1e-5"],
        None,
    ),
    "blocks, a folded map": (["pruning/patch=linear_ffn"], "9L"),
    "blocks, a retrained one, all weights": (
        ["pruning/patch=block", "pruning.patch.fit.epochs=1", "tuning=full", "loss.terms.squarehead.junction=skip"],
        "9L",
    ),
    "the last blocks, in 4 bit": (["pruning=last", "tuning=qlora"], "9L"),
    "blocks by coalitions": (
        ["pruning=shapley", "pruning.metric.orders=4", "pruning.metric.value.sequences=4"],
        "9L",
    ),
}


@pytest.mark.parametrize("name", CUTS)
def test_other_cuts_and_patches_run_whole(name: str, first: tuple[Path, Path, dict], tmp_path: Path) -> None:
    """From the score to the table, and back from disk with the numbers of the table's model."""
    overrides, depth = CUTS[name]
    loss = "loss=squarehead" if any("squarehead" in given for given in overrides) else "loss=sft"
    short = ("trainer.budget=steps", "trainer.steps=2", loss)
    summary = job(tmp_path, first[1], *short, *overrides)
    assert summary["depth"] == depth or depth is None
    assert summary["cache_bytes"]["pruned"] <= summary["cache_bytes"]["unpruned"]
    patched = any("patch" in given for given in overrides)
    assert bool(summary["patch_unexplained"]) == patched == ("patch" in summary["artifacts"])
    model, _ = sddx.load(tmp_path / "summary.json")
    assert torch.isfinite(model(torch.arange(20)[None]).logits).all()


def test_scoring_alone_says_how_far_metrics_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """stages=[score]: a table, a figure of the correlations and a map of distances."""
    with composed(*SMALL, f"store={tmp_path / 'store'}", "stages=[score]", "metrics=one_pass", out=tmp_path) as cfg:
        page = run(resolve(cfg), tmp_path)
    assert "norm\\_ratio" in page.read_text() and "rank correlation" in page.read_text()
    drawn = {path.stem for path in tmp_path.glob("*.svg")}
    assert drawn == {"agreement", "angular", "angular_all_tokens"}
    assert "block_influence" in capsys.readouterr().out


def test_another_teacher_is_loaded_beside_the_student(first: tuple[Path, Path, dict], tmp_path: Path) -> None:
    """Given the same weights in a folder of their own, training is the same to the last bit."""
    short = ("loss=kd", "trainer.budget=steps", "trainer.steps=2")
    shared = job(tmp_path / "shared", first[1], *short)
    copied = shutil.copytree(CHECKPOINT, tmp_path / "teacher")
    beside = job(tmp_path / "beside", first[1], *short, f"teacher={copied}")
    assert shared["artifacts"]["train"] != beside["artifacts"]["train"]
    assert curves(tmp_path / "shared") == curves(tmp_path / "beside")


def curves(out: Path) -> list[dict]:
    timed = ("tokens_per_second", "seconds")
    rows = csv.DictReader((out / "metrics.csv").open())
    return [row for row in rows if row["name"].startswith("train/") and not row["name"].endswith(timed)]


def test_several_devices_train_the_same_student(first: tuple[Path, Path, dict], tmp_path: Path) -> None:
    """Shards in two processes, beside a patch that learns and a teacher that is separate for it: the stages
    around run once, the rows and what is saved are those of one process, under the same key."""
    given = [
        "loss=kd", "pruning=last", "pruning/patch=low_rank", "pruning.patch.fit.rank=4", "trainer.batch_size=4",
        "pruning.patch.trained=true", "trainer.accumulate=2", "trainer.budget=steps", "trainer.steps=2",
        "evaluation.tasks=[tiny_facts]",
    ]  # fmt: skip
    more = ["trainer.strategy=fsdp", "trainer.devices=2"]
    whole = shutil.ignore_patterns(".*", "*.partial", "*.lock")  # others may be building in it
    stores = {"one": first[1], "two": shutil.copytree(first[1], tmp_path / "store", ignore=whole)}
    keys = [job(tmp_path / n, stores[n], *given, *extra)["artifacts"] for n, extra in (("one", []), ("two", more))]
    assert keys[0] == keys[1]
    one, two = (next(store.glob(f"train/*/{keys[0]['train']}")) for store in stores.values())
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    for name in ("adapter_model.safetensors", "junction.safetensors"):
        ours, theirs = load_file(two / name), load_file(one / name)
        assert ours.keys() == theirs.keys()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    for a, b in zip(curves(tmp_path / "two"), curves(tmp_path / "one"), strict=True):
        assert a["name"] == b["name"] and float(a["value"]) == pytest.approx(float(b["value"]), rel=1e-5)


def test_packed_rows_train_the_same_student(first: tuple[Path, Path, dict], tmp_path: Path) -> None:
    """Beside a teacher and with what was captured of it; under another key, since dropout draws otherwise."""
    asked = [
        "loss=kd", "trainer.batch_size=4", "trainer.accumulate=2", "trainer.budget=steps", "trainer.steps=2",
        "evaluation.tasks=[tiny_facts]",
    ]  # fmt: skip
    for number, teacher in enumerate(([], ["teacher_cache=4"])):
        outs = [tmp_path / f"{name}{number}" for name in ("padded", "packed")]
        padded, packed = (
            job(out, first[1], *asked, *teacher, f"trainer.packing={str(on).lower()}")["artifacts"]
            for out, on in zip(outs, (False, True), strict=True)
        )
        assert {name for name in padded if padded[name] != packed[name]} == {"train", "evaluate_recovered"}
        for a, b in zip(*map(curves, outs), strict=True):
            assert a["name"] == b["name"] and float(a["value"]) == pytest.approx(float(b["value"]), rel=1e-4)


def altered(folder: Path, **fields: object) -> Path:
    """A copy of the embedded model whose config says something else."""
    shutil.copytree(CHECKPOINT, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


def test_a_teacher_that_does_not_fit_is_refused(first: tuple[Path, Path, dict], tmp_path: Path) -> None:
    """Another vocabulary, other blocks to be held to, or no term that would ask it."""
    other, wider = altered(tmp_path / "other", vocab_size=500), altered(tmp_path / "wider", hidden_size=256)
    for loss, teacher, complaint in (
        ("kd", other, "500"),
        ("squarehead", wider, "same shape"),
        ("sft", wider, "uses a teacher"),
    ):
        with pytest.raises(UserError, match=complaint):
            job(tmp_path / "out", first[1], f"loss={loss}", f"teacher={teacher}")


def test_a_teacher_of_other_tokens_is_refused(first: tuple[Path, Path, dict], tmp_path: Path) -> None:
    """Of as many, which would be held against one another by their numbers; or of a context too short for rows."""
    other = altered(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokens, words = tokenizer["model"]["vocab"], ("Ġa", "Ġthe")
    if not tokens.keys() >= {*words}:
        words = tuple(sorted(tokens)[-2:])
    tokens[words[0]], tokens[words[1]] = tokens[words[1]], tokens[words[0]]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    short = altered(tmp_path / "short", max_position_embeddings=64)
    for teacher, said in ((other, "has another tokenizer"), (short, "reads 64 tokens.*Set max_length=64")):
        with pytest.raises(UserError, match=said):
            job(tmp_path / "out", first[1], "loss=kd", f"teacher={teacher}")


def test_load_gives_the_recovered_model(first: tuple[Path, Path, dict]) -> None:
    out, _, summary = first
    model, tokenizer = sddx.load(out / "summary.json")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Where does Ann live?"}], tokenize=False)
    ids = tokenizer(chat, return_tensors="pt")["input_ids"]
    assert model.config.num_hidden_layers == len(summary["cut"])
    assert torch.isfinite(model(ids).logits).all()


def test_load_says_what_is_gone(first: tuple[Path, Path, dict], tmp_path: Path) -> None:
    _, _, summary = first
    moved = tmp_path / "summary.json"
    moved.write_text(json.dumps(summary | {"store": str(tmp_path)}))
    with pytest.raises(UserError, match="gone"):
        sddx.load(moved)


def test_a_users_own_model_rows_metric_and_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything from a folder outside the package, with no edit in sddx/."""
    write_own_world(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    summary = job(
        tmp_path / "out", tmp_path / "store", "model=local", f"model.path={CHECKPOINT}", "dataset=mine",
        "dataset.size=12", "pruning=mine", "evaluation.tasks=[capitals]",
        f"evaluation.include={tmp_path / 'tasks'}", "loss=kd", config_dir=tmp_path / "conf",
    )  # fmt: skip
    assert summary["cut"] == list(range(2, 12))
    assert list(summary["scores"]["recovered"]) == ["capitals", "average"]


def write_own_world(folder: Path) -> None:
    rows = [{"q": f"Sort from low to high: {n + 3}, {n}.", "a": f"{n}, {n + 3}."} for n in range(10, 40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "my_metric.py").write_text(
        "import torch\ndef depth(states, mask):\n    return torch.arange(len(states) - 1.0).expand(len(mask), -1)\n"
    )
    for group in ("dataset", "pruning"):
        (folder / "conf" / group).mkdir(parents=True)
    (folder / "conf/dataset/mine.yaml").write_text(
        f"_target_: sddx.data.sources.jsonl\npath: {folder}/rows.jsonl\nprompt: q\nresponse: a\nsize: 12\nseed: 0\n"
        "check: {_target_: sddx.data.checkers.exact, _partial_: true}\nrewrite: tiny\ntrains: []\n"
    )
    (folder / "conf/pruning/mine.yaml").write_text(
        "defaults: [base, _self_]\nremove: 2\nmetric: {_target_: my_metric.depth, _partial_: true}\n"
    )
    (folder / "tasks").mkdir()
    (folder / "tasks/capitals.jsonl").write_text('{"q": "Where is Rome?", "c": ["Italy", "Peru"], "a": 0}\n' * 3)
    (folder / "tasks/capitals.yaml").write_text(
        "task: capitals\ncustom_dataset: !function sddx.evaluation.harness.json_lines\n"
        "dataset_kwargs: {data_files: {test: capitals.jsonl}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_target: a\ndoc_to_choice: c\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
        "metadata: {version: 1.0, chance: 0.5}\n"
    )


MISTAKES = {
    "more blocks than there are": (["pruning.remove=13"], ["12 blocks", "0 to 12"]),
    "a task that does not exist": (["evaluation.tasks=[tiny_arithmetik]"], ["tiny_arithmetic"]),
    "no such model": (["model=local", "model.path=/no/where"], ["/no/where", "model=tiny"]),
    "no such file": (["dataset=jsonl", "dataset.path=/no/rows.jsonl"], ["/no/rows.jsonl"]),
    "more rows than there are": (["dataset.size=100000"], ["8500"]),
    "more branches than there are": (["pruning.units=attention", "pruning.remove=13"], ["12 units", "0 to 12"]),
    "nothing left to learn": (["pruning.remove=12"], ["pruning.remove=12", "loss=none"]),
    "units that do not exist": (["pruning.units=heads"], ["heads", "sublayers"]),
    "stages that cannot be run alone": (["stages=[train]"], ["train", "[score]"]),
    "a patch that no weight can take": (["pruning/patch=linear", "pruning.patch.fold=true"], ["linear_ffn"]),
    "a folded patch that learns": (
        ["pruning/patch=mean", "pruning.patch.fold=true", "pruning.patch.trained=true"],
        ["trained=false"],
    ),
    "a term that holds a block to a patch": (
        ["pruning/patch=mean", "loss=squarehead", "loss.terms.squarehead.junction=span_end"],
        ["junction=own"],
    ),
    "a task without selection items": (
        ["pruning=shapley_task", "pruning.metric.value.tasks=[gsm8k]"],
        ["gsm8k_selection", "oracle"],
    ),
    "two things at once": (
        ["pruning.remove=13", "evaluation.tasks=[tiny_arithmetik]"],
        ["12 blocks", "tiny_arithmetic"],
    ),
    "a stage that does not exist": (["accept=[distil]"], ["distil", "distill"]),
    "a W&B mode that does not exist": (["wandb.mode=of"], ["offline"]),
    "a device that is not there": (["device=cuda:7"], ["cuda:7", "device=auto"]),
    "a device without numbers": (["device=meta"], ["device=meta", "device=auto"]),
    "an attention that is not there": (["model.attention=nope"], ["model.attention=nope", "sdpa"]),
    "an attention without its package": (["model.attention=flash_attention_2"], ["flash_attention_2", "eager"]),
    "an adapter on tied weights": (["tuning.targets=[q_proj,lm_head]"], ["lm_head", "embed_tokens", "tied"]),
    "an adapter larger than the model": (["tuning.rank=100000"], ["tuning.rank=100000", "128"]),
    "an adapter that is dropped": (["tuning.dropout=1"], ["tuning.dropout=1", "less than 1"]),
    "a strategy that does not exist": (["trainer.strategy=dpp"], ["Did you mean ddp"]),
    "more devices than one without a strategy": (["trainer.devices=2"], ["trainer.devices=2", "strategy=ddp"]),
    "the best by no rows": (["trainer.keep=best", "validation=0"], ["trainer.keep=best", "validation=0"]),
    "the best by the last alone": (["trainer.keep=best"], ["trainer.keep=best", "validate_every"]),
    "all weights in half precision": (
        ["model.dtype=bfloat16", "tuning=full"],
        ["model.dtype=bfloat16", "rounded away", "trainer.precision=bf16"],
    ),
    "a block in half precision": (
        ["model.dtype=bfloat16", "pruning/patch=block", "pruning.patch.trained=true"],
        ["pruning.patch.trained=true", "model.dtype=float32"],
    ),
    "layers that are not there": (["tuning.targets=[q_prj]"], ["'q_prj'", "q_proj"]),
    "no layers": (["tuning.targets=[]"], ["tuning.targets is empty"]),
    "devices without a share": (["trainer.strategy=ddp", "trainer.devices=2"], ["trainer.accumulate"]),
    "4 bits of an unknown kind": (["tuning=qlora", "tuning.quantization.type=nf3"], ["nf3", "nf4"]),
    "shards of 4-bit weights": (["tuning=qlora", "trainer.strategy=fsdp"], ["shards", "ddp"]),
    "4-bit weights that take up a patch": (["tuning=qlora", "pruning/patch=linear_ffn"], ["fold=false"]),
    "rows packed for an attention that was not tried": (
        ["trainer.packing=true", "model.attention=flex_attention"],
        ["model.attention=flex_attention", "trainer.packing=false"],
    ),
    "rows too long to learn from": (["max_length=5"], ["max_length=5"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_before_any_training(name: str, first: tuple[Path, Path, dict], tmp_path: Path) -> None:
    overrides, parts = MISTAKES[name]
    with pytest.raises(UserError) as caught:
        job(tmp_path, first[1], *overrides)
    assert all(part in str(caught.value) for part in parts)


def test_a_family_whose_blocks_hang_on_their_numbers_is_told_before_any_work(tmp_path: Path) -> None:
    """Not after the unpruned model was judged and wrote its answers. What hangs on no number goes through."""
    with composed("pruning.remove=1") as cfg:
        settings = resolve(cfg)
    for kind, right in (("diffllama", False), ("granite", True)):
        config = CONFIG_MAPPING[kind](num_hidden_layers=4)
        if right:
            _check_family(settings, config, "eager")
        else:
            with pytest.raises(UserError, match="narrow diffllama .* hangs on its number"):
                _check_family(settings, config, "eager")


def test_a_real_model_is_not_cut_by_tasks_of_the_embedded_world() -> None:
    """Whose words it does not have; tasks of its own must be named."""
    with composed("pruning=shapley_task") as cfg:
        metric = resolve(cfg)["pruning"]["metric"]
    with pytest.raises(UserError, match=r"tiny_arithmetic_selection, .*other words.*tasks=\[mmlu\]"):
        _check_measured(metric, "blocks", LlamaConfig())
    _check_measured(metric, "blocks", LlamaConfig(vocab_size=484))


def test_what_this_machine_lacks_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices, bfloat16, bitsandbytes; and a launcher that starts the whole run several times."""

    def complaint(*overrides: str) -> str:
        with pytest.raises(UserError) as caught:
            job(tmp_path / "out", tmp_path, *overrides)
        return str(caught.value)

    cuda = {"is_available": True, "device_count": 2, "is_bf16_supported": False, "get_device_name": "Old"}
    for name, value in cuda.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda value=value, **given: value)
    four = ("trainer.strategy=ddp", "trainer.devices=4", "trainer.accumulate=4", "device=cuda")
    assert "finds 2 CUDA devices" in complaint(*four)
    compute, half = "tuning.quantization.compute", ("trainer.precision=bf16", "model.dtype=bfloat16")
    for given, named, instead in (
        (half[:1], half[0], "trainer.precision=32"),
        (half[1:], half[1], "model.dtype=float32"),
        (half, ", ".join(half), "trainer.precision=32 model.dtype=float32"),
        (["tuning=qlora"], f"{compute}=bfloat16", f"{compute}=float32"),
    ):
        expected = f"{named}, but a Old does not compute in bfloat16. Use {instead}."
        assert complaint(*given, "device=cuda") == expected
    with monkeypatch.context() as hidden:
        hidden.setattr("sddx.models.load.find_spec", lambda name: None)
        assert "sddx[qlora]" in complaint("tuning=qlora")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "trainer.devices=4" in complaint()


def test_a_store_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="SDDX_STORE"):
        job(tmp_path / "out", tmp_path / "file")


def test_a_model_without_a_chat_template_is_refused(first: tuple[Path, Path, dict], tmp_path: Path) -> None:
    shutil.copytree(CHECKPOINT, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="chat template"):
        job(tmp_path / "out", first[1], "model=local", f"model.path={tmp_path / 'model'}")


BROKEN = {
    "it drops the prompt": (
        "{% if not add_generation_prompt %}{{ messages[-1].content }}{% endif %}",
        "drops the user",
    ),
    "it drops the answer": ("{{ messages[0].content }}", "cannot be found"),
    "it does not render": ("{{ raise_exception('no turns') }}", "no turns"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_chat_template_is_told_before_any_work(name: str, tmp_path: Path) -> None:
    template, complaint = BROKEN[name]
    shutil.copytree(CHECKPOINT, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=complaint):
        job(tmp_path / "out", tmp_path / "store", "model=local", f"model.path={tmp_path / 'model'}")
    assert not (tmp_path / "store").exists()


def test_a_template_that_drops_descriptions_is_told_before_any_work(tmp_path: Path) -> None:
    """Where it is used, and a task has one."""
    shutil.copytree(CHECKPOINT, tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text(template.read_text().replace("in messages", "in messages if message.role != 'system'"))
    shutil.copytree(OWN_TASKS, tmp_path / "tasks")
    (tmp_path / "tasks" / "mine.yaml").write_text("include: facts.yaml\ntask: mine\ndescription: Choose one.\n")
    mine = ("evaluation.tasks=[tiny_facts,mine]", f"evaluation.include={tmp_path / 'tasks'}")
    local = ("model=local", f"model.path={tmp_path / 'model'}", *mine, "pruning.remove=13")
    for given, told in (("true", True), ("false", False)):
        with pytest.raises(UserError, match="12 blocks") as caught:
            job(tmp_path / "out", tmp_path / "store", *local, f"evaluation.chat_template={given}")
        assert ("drops the system prompt, " in str(caught.value)) == told
        assert ("tasks there: mine." in str(caught.value)) == told


def test_no_model_is_asked_for_before_the_settings_are_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is wrong without it is told at once, rows and texts that are not here included; then the model."""
    monkeypatch.setattr(HfApi, "dataset_info", lambda self, name, **_: (_ for _ in ()).throw(OSError("no network")))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))  # nothing was fetched
    asked: list[str] = []
    monkeypatch.setattr("sddx.models.load.download", lambda path, revision: asked.append(path) or Path(path))
    far = ("model=llama31_8b_instruct", "evaluation.chat_template=false")
    wrong = ("evaluation.tasks=[tiny_arithmetik]", "dataset=gsm8k", "text=wikitext", "trainer.devices=2")
    with pytest.raises(UserError) as caught:
        job(tmp_path / "out", tmp_path / "store", *far, *wrong)
    told = str(caught.value)
    assert all(name in told for name in ("tiny_arithmetik", "gsm8k", "wikitext", "trainer.devices=2"))
    assert "Llama" not in told and not asked
    with (
        pytest.raises(UserError, match="is not on this machine.*sddx plan"),
        composed(*SMALL, *far) as cfg,
    ):
        verify(config := resolve(cfg) | {"dry_run": True})
        look(config)
    assert not asked
    with pytest.raises(UserError, match="config.json"):
        job(tmp_path / "out", tmp_path / "store", *far)
    assert asked


def test_the_command_line_shows_no_traceback(tmp_path: Path) -> None:
    """From any directory: status 2 and a message for a user's mistake."""
    done = command("sddx.train", "pruning.remove=40", f"store={tmp_path}", "wandb.mode=disabled", cwd=tmp_path)
    assert done.returncode == 2
    assert "pruning.remove=40" in done.stderr and "Traceback" not in done.stderr


def test_the_notebook_reads_a_run(first: tuple[Path, Path, dict], monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs from top to bottom on a run folder and draws one figure."""
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("SDDX_RUNS", str(first[0]))
    path = Path(__file__).parents[1] / "notebooks" / "read_a_run.ipynb"
    notebook = NotebookClient(nbformat.read(path, as_version=4), timeout=120).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert outputs[0].text == "1 runs\n"
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1


def prepared(out: Path, size: int) -> Path:
    from sddx.runtime import Runtime
    from sddx.stages.prepare.run import prepare

    out.mkdir()
    with composed(f"dataset.size={size}", "run.name=x") as cfg:
        prepare(out, files=[], runtime=Runtime(quiet=True), dataset=resolve(cfg)["dataset"], validation=8)
    return out


def test_a_larger_set_shares_the_full_shards_of_a_smaller_one(tmp_path: Path) -> None:
    """600 rows after 300 distil only what is new: the held-out rows and the first shard are the same bytes."""
    small, large = prepared(tmp_path / "small", 300), prepared(tmp_path / "large", 600)
    shards = [sorted(path.name for path in (folder / "shards").iterdir()) for folder in (small, large)]
    assert [len(names) for names in shards] == [2, 3]
    for shared in ("validation.jsonl", f"shards/{shards[0][0]}"):
        assert (small / shared).read_bytes() == (large / shared).read_bytes()
    assert (small / "shards" / shards[0][1]).read_bytes() in (large / "shards" / shards[0][1]).read_bytes()
