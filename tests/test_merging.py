"""Laws of merging: what becomes of tensors, of files, and of a run that merges."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from composing import SMALL, composed, resolve
from safetensors.torch import load_file, save_file

from sddx.errors import UserError, mistakes_of
from sddx.merging import methods
from sddx.merging.files import merge_files
from sddx.merging.methods import Place
from sddx.pipeline import Run, _longer
from sddx.report import table
from sddx.report.summary import RunArtifacts
from sddx.report.summary import _training as trained
from sddx.run_folder import CONFIG, read_config
from sddx.runtime import Runtime
from sddx.stages.cost import estimated
from sddx.store import Store
from sddx.sweep.plan import Plan
from sddx.train import look, method, run, verify

HERE = Place("model.layers.1.mlp.weight", 1)
EXACT = {"density": 1.0}
METHODS = {
    "slerp": (methods.slerp, {}), "differences": (methods.slerp, {"of": "differences"}),
    "linear": (methods.linear, {}), "task_arithmetic": (methods.task_arithmetic, {}),
    "ties": (methods.ties, EXACT), "dare": (methods.dare, EXACT),
}  # fmt: skip


def tensors(count: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(6, 5, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_equal_students_merge_into_themselves(name: str, dtype: torch.dtype) -> None:
    """With nothing dropped and weights that sum to 1; in half precision to its rounding."""
    merge, settings = METHODS[name]
    base, student = tensors(2, dtype)
    merged, _ = merge([student, student], base, HERE, **settings)
    assert merged.dtype == dtype
    torch.testing.assert_close(merged, student)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("end", [0, 1])
def test_the_ends_are_the_students_bit_for_bit(dtype: torch.dtype, end: int) -> None:
    base, *students = tensors(3, dtype)
    for of in ("weights", "differences"):
        assert torch.equal(methods.slerp(students, base, HERE, t=end, of=of)[0], students[end])
    weights = [float(end == 0), float(end == 1)]
    assert torch.equal(methods.linear(students, base, HERE, weights=weights)[0], students[end])


def test_the_arc_keeps_lengths_and_shares_the_angle() -> None:
    """Between tensors of one length every point has that length, and t of the whole angle to the first."""
    x, y = (each / each.norm() for each in tensors(2))
    whole = torch.arccos((x * y).sum())
    for t in (0.25, 0.5, 0.9):
        merged, way = methods.slerp([x, y], torch.zeros_like(x), HERE, t=t)
        assert way == "arc"
        torch.testing.assert_close(merged.norm(), torch.ones((), dtype=torch.float64))
        torch.testing.assert_close(torch.arccos((x * merged).sum()), t * whole)


REFERENCES = json.loads((Path(__file__).parent / "references" / "mergekit_slerp.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", REFERENCES["cases"], ids=lambda case: f"{case['dtype']}-{case['t']}")
def test_the_arc_is_mergekits(case) -> None:
    """Numbers that mergekit 0.1.5 gave, on arcs and lines; in half precision to its last bit but one."""
    dtype = getattr(torch, case["dtype"])
    x, y, expected = (torch.tensor(case[name], dtype=torch.float64).to(dtype) for name in ("x", "y", "merged"))
    merged, _ = methods.slerp([x, y], torch.zeros_like(x), HERE, t=case["t"])
    torch.testing.assert_close(merged, expected)


def test_siblings_and_zeros_take_the_line() -> None:
    x, noise = tensors(2)
    for y in (x + 1e-3 * noise, torch.zeros_like(x)):
        merged, way = methods.slerp([x, y], torch.zeros_like(x), HERE, t=0.3)
        assert way == "line"
        torch.testing.assert_close(merged, 0.7 * x + 0.3 * y)


def test_the_arc_of_differences_is_that_of_what_was_learned() -> None:
    """Siblings lie on a line, and what they learned does not."""
    base, x, y = tensors(3)
    students = [base + 1e-3 * x, base + 1e-3 * y]
    merged, way = methods.slerp(students, base, HERE, of="differences")
    assert way == "arc" and methods.slerp(students, base, HERE)[1] == "line"
    expected, _ = methods.slerp([x, y], torch.zeros_like(x), HERE)
    torch.testing.assert_close(merged, base + 1e-3 * expected)


def test_task_arithmetic_is_linear_where_weights_sum_to_one() -> None:
    base, *students = tensors(4)
    weights = [0.2, 0.5, 0.3]
    one, _ = methods.task_arithmetic(students, base, HERE, weights=weights)
    other, _ = methods.linear(students, base, HERE, weights=weights)
    torch.testing.assert_close(one, other)
    more, _ = methods.task_arithmetic(students, base, HERE, weights=[1, 1, 1])
    torch.testing.assert_close(more - base, sum(each - base for each in students))


def test_ties_averages_what_agrees_and_drops_the_small() -> None:
    """By hand: the sign of the sum wins, and those that have it are averaged."""
    base = torch.zeros(4, dtype=torch.float64)
    students = [
        torch.tensor(each, dtype=torch.float64) for each in ([4.0, 1.0, -3.0, 0.5], [2.0, -3.0, -1.0, 0.25])
    ]
    merged, _ = methods.ties(students, base, HERE, density=1.0)
    assert merged.tolist() == [3.0, -3.0, -2.0, 0.375]
    half, _ = methods.ties(students, base, HERE, density=0.5)
    assert half.tolist() == [3.0, -3.0, -3.0, 0.0]


@pytest.mark.parametrize("weights", [[1, 0], [0, 1], [0.25, 0.75], [2, 2], [3, -1], [1, -1]])
@pytest.mark.parametrize("density", [0.4, 1.0])
def test_ties_is_the_weighted_mean_of_those_that_have_the_sign_of_the_weighted_sum(weights, density) -> None:
    """Value by value, as mergekit 0.1.5 computes it; at weights of 1 and 0 that is what the one student keeps."""
    base, *students = tensors(3)
    kept = [methods._pruned(each - base, density, "magnitude") for each in students]
    expected = []
    for values in zip(*(each.flatten().tolist() for each in kept), strict=True):
        terms = [weight * value for weight, value in zip(weights, values, strict=True)]
        sign = 1 if sum(terms) >= 0 else -1
        agree = [(term, weight) for term, weight in zip(terms, weights, strict=True) if term * sign > 0]
        expected.append(sum(term for term, _ in agree) / (sum(weight for _, weight in agree) or 1))
    merged, _ = methods.ties(students, base, HERE, weights=weights, density=density)
    torch.testing.assert_close((merged - base).flatten(), torch.tensor(expected, dtype=torch.float64))
    if 0 in weights:
        torch.testing.assert_close(merged, base + kept[weights.index(1)])


def test_dare_draws_by_seed_student_and_tensor_and_keeps_the_mean() -> None:
    base, student = torch.zeros(200, 50, dtype=torch.float64), torch.ones(200, 50, dtype=torch.float64)
    torch.manual_seed(1)
    one, _ = methods.dare([student, student], base, HERE, density=0.25)
    torch.manual_seed(2)
    again, _ = methods.dare([student, student], base, HERE, density=0.25)
    assert torch.equal(one, again)
    assert abs(float(one.mean()) - 1) < 0.05 and set(one.unique().tolist()) == {0.0, 2.0, 4.0}
    for change in ({"seed": 1}, {"place": Place("another", 1)}):
        place = change.pop("place", HERE)
        assert not torch.equal(methods.dare([student, student], base, place, density=0.25, **change)[0], one)


def test_settings_may_be_one_for_each_block() -> None:
    base, x, y = tensors(3)
    at = [0.0, 1.0, 0.5]
    assert torch.equal(methods.slerp([x, y], base, Place("a", 0), t=at)[0], x)
    assert torch.equal(methods.slerp([x, y], base, Place("a", 1), t=at)[0], y)
    expected, _ = methods.slerp([x, y], base, Place("a"), t=0.5)
    assert torch.equal(methods.slerp([x, y], base, Place("a", None), t=at)[0], expected)
    weights = [[1, 0, 0.5], [0, 1, 0.5]]
    assert torch.equal(methods.linear([x, y], base, Place("a", 1), weights=weights)[0], y)
    with pytest.raises(UserError, match="gives 3 numbers, one for each block"):
        methods.slerp([x, y], base, Place("a", 3), t=at)


def folder(path: Path, weights: dict[str, torch.Tensor], files: int = 1) -> Path:
    path.mkdir()
    names = sorted(weights)
    for number in range(files):
        save_file({name: weights[name] for name in names[number::files]}, path / f"model-{number}.safetensors")
    return path


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: each for file in path.glob("*.safetensors") for name, each in load_file(file).items()}


def test_files_are_merged_by_name_however_they_are_cut(tmp_path: Path) -> None:
    """The order of tensors and the files that they are in change nothing."""
    names = [f"model.layers.{number}.weight" for number in range(3)] + ["model.norm.weight"]
    models = [dict(zip(names, tensors(4, torch.float32), strict=True)) for _ in range(3)]
    for model, factor in zip(models, (1.0, 2.0, 0.5), strict=True):
        model.update({name: factor * each + torch.arange(5) for name, each in model.items()})
    found = []
    for turn, files in enumerate(((1, 1, 1), (2, 3, 1))):
        at = tmp_path / str(turn)
        at.mkdir()
        one, two, base = (folder(at / str(n), m, f) for n, (m, f) in enumerate(zip(models, files, strict=True)))
        (at / "out").mkdir()
        ways = merge_files([one, two], base, at / "out", methods.slerp)
        assert sum(ways.values()) == 4
        found.append(weights_of(at / "out"))
    assert found[0].keys() == found[1].keys() == set(names)
    for name in names:
        assert torch.equal(found[0][name], found[1][name])
        expected, _ = methods.slerp([models[0][name], models[1][name]], models[2][name], Place(name))
        assert torch.equal(found[0][name], expected)


def test_files_at_an_end_are_a_students_byte_for_byte(tmp_path: Path) -> None:
    """Of any dtype and shape, a single number and none among them, and in several files."""
    kinds = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    one = {f"layers.{n}.a": each for n, kind in enumerate(kinds) for each in tensors(1, kind)}
    one |= {"scale": torch.tensor(3.0), "none": torch.zeros(0, 4, dtype=torch.bfloat16)}
    two = {name: 2 * each for name, each in one.items()}
    first, second, out = folder(tmp_path / "one", one, 2), folder(tmp_path / "two", two), tmp_path / "out"
    out.mkdir()
    merge_files([first, second], second, out, partial(methods.slerp, t=0))
    for path in first.glob("*.safetensors"):
        assert (out / path.name).read_bytes() == path.read_bytes()
    merge_files([second, first], second, out, partial(methods.slerp, t=0.5))
    assert torch.equal(weights_of(out)["none"], one["none"]) and weights_of(out)["scale"] == 4.5


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"a": torch.ones(2, 3)}, r"a is F32 \[2, 3\] in one and F32 \[2, 2\] in the other"),
        ({"a": torch.ones(2, 2, dtype=torch.bfloat16)}, r"a is BF16 \[2, 2\] in one and F32"),
        ({"b": torch.ones(2, 2)}, "only one of them has a and 1 more"),
    ],
)
def test_models_of_other_shapes_dtypes_or_names_are_refused_before_a_tensor_is_read(tmp_path, other, said) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a tensor was read")

    one = folder(tmp_path / "one", {"a": torch.ones(2, 2)})
    two, out = folder(tmp_path / "two", other), tmp_path / "out"
    with pytest.raises(UserError, match=said):
        merge_files([one, two], one, out, never)


MERGED = (
    *SMALL,
    "loss=sft",
    "+merging=slerp",
    "merging.students=['dataset=tiny_arithmetic','dataset=tiny_comparison']",
)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["merging.students=['seed=0']"], r"merging.students names 1\. Name two runs or more"),
        (["merging.students=['seed=0','seed=1','seed=2']"], "goes from one student to another, and there are 3"),
        (["merging.students=['seed=0','pruning.remove=2']"], "changes pruning. Only students of one base model"),
        (["merging.students=['seed=0','loss=none']"], "'loss=none' trains nothing"),
        (["merging.students=['seed=0','seed=1']", "pruning.units=attention"], "written as plain models"),
        (["merging.mixed=maybe"], "merging.mixed='maybe' must be true or false"),
        (
            ["merging.mixed=true", "merging.students=['seed=0','loss=kd']"],
            "'loss=kd' changes loss, and one student",
        ),
        (["+merging.method.sharp=1"], "merging.method.sharp is not a setting"),
        (
            ["merging.mixed=true", "merging.students=['seed=0','validation=4 dataset.rewrite=math']"],
            "'validation=4 dataset.rewrite=math' trains on prompts that are held out for merging.mixed",
        ),
        (["merging.method.t=1.5"], "merging.method.t=1.5 must be"),
        (["merging.method.t=[0.1,0.2]"], r"merging.method.t holds 2 numbers, and \d+ blocks are left"),
        (["merging=dare", "merging.method.density=0"], "merging.method.density=0 must be"),
        (
            ["merging=linear", "merging.method.weights=[a,0.5]"],
            "merging.method.weights holds 'a', and numbers or lists of such alone are allowed",
        ),
        (["merging=base"], "merging.method="),
        (["merging.method=linear"], "merging.method='linear' must be a group of settings with its _target_"),
        (["+merging.mixd=true"], r"merging.mixd is not a setting. Did you mean merging.mixed\?"),
        (["~merging.students"], "merging.students has no value"),
        (["+merging.search=blocks"], "merging.search='blocks' must be"),
        (["+merging/search=blocks", "+merging.search.steps=2"], "merging.search.steps is not a setting"),
    ],
)
def test_what_cannot_be_merged_is_refused_before_work(given: list[str], said: str) -> None:
    with composed(*MERGED, *given) as cfg, pytest.raises(UserError, match=said):
        verify(resolve(cfg))


@pytest.mark.parametrize(
    ("students", "said"),
    [
        (
            "['seed=0','dataset=nothing']",
            "'dataset=nothing' is no finished run's folder, nor does it make a run here",
        ),
        ("[0,1]", "merging.students names a run as 0. Give what it changes here as a text"),
        (f"['seed=0','dataset={'x' * 300}']", "is no finished run's folder, nor does it make a run here"),
        ("['seed=0',\"dataset.path=bob's\"]", "cannot be read as overrides: No closing quotation."),
        ("seed\\=0", "merging.students='seed=0' is no list. Give runs by what they change here"),
    ],
)
def test_settings_that_make_no_run_are_told(students: str, said: str) -> None:
    with composed(*MERGED, f"merging.students={students}") as cfg, pytest.raises(UserError) as told:
        resolve(cfg)
    assert said in str(told.value)


def test_what_a_method_makes_must_be_like_its_students(tmp_path: Path) -> None:
    """In shape and dtype, of finite numbers, with the way in words: else a file is damaged without a word."""
    one = folder(tmp_path / "one", {"a": torch.ones(2, 2)})
    (tmp_path / "out").mkdir()
    for made, said in (
        ((torch.ones(2, 2).double(), "line"), "made torch.float64"),
        ((torch.ones(2, 3), "line"), r"made torch.float32 \[2, 3\] of a"),
        ((torch.full((2, 2), torch.nan), "line"), "not finite"),
        ((torch.ones(2, 2), 3), "the way that it took, a text"),
        (torch.ones(2, 2), "the way that it took, a text"),
    ):
        with pytest.raises(UserError, match=said):
            merge_files([one, one], one, tmp_path / "out", lambda *_, made=made: made)


def test_a_run_merges_its_parents_and_judges_all(tmp_path: Path) -> None:
    """From overrides, then from the folder of a finished run: the same parents, the same merged model."""
    store = tmp_path / "store"
    with composed(*MERGED, f"store={store}") as cfg:
        config = resolve(cfg)
    summary = json.loads(run(config, tmp_path / "one").read_text())
    names = [each["name"] for each in summary["subjects"]]
    assert names == ["unpruned", "pruned", "recovered", "dataset=tiny_comparison", "merged"]
    assert set(summary["merged"]["ways"]) <= {"arc", "line"} and sum(summary["merged"]["ways"].values()) > 50
    assert summary["recoveries"]["merged"] and "merge" in summary["seconds"]
    first = Run(Store(store), Runtime(quiet=True), method(config))
    parents = first.parents
    with composed(*SMALL, "loss=sft", "dataset=tiny_comparison", f"store={store}") as cfg:
        finished = run(resolve(cfg), tmp_path / "two")
    asked = f"merging.students=['dataset=tiny_arithmetic','{finished.parent}']"
    _hold_out_fewer(finished.parent, config["dataset"])
    for measured, said in ((["+drift=full", "drift.size=8"], ["that are held out for drift"]), ([], [])):
        with composed(*MERGED, asked, *measured, f"store={store}") as cfg:
            told = mistakes_of([lambda cfg=cfg: verify(resolve(cfg))])
        assert len(told) == len(said) and all(part in each for part, each in zip(said, told, strict=True))
    with composed(*MERGED, asked, f"store={store}") as cfg:
        again = Run(Store(store), Runtime(quiet=True), method(resolve(cfg)))
        read = {each.key for each in again._all_data()}
        assert len(read) == 2 and read == {each.key for each in first._all_data()}
        assert [each.key for each in again.parents] == [each.key for each in parents]
        assert again.merged is not None and again.merged.key == summary["artifacts"]["merge"]
        plan = look(resolve(cfg) | {"store": str(tmp_path / "empty")})
    assert "merge" in {step.stage for step in plan.steps if not step.present}


def _hold_out_fewer(folder: Path, dataset: dict[str, Any]) -> None:
    """Let a finished run have held out fewer rows of this data set."""
    settings = read_config(folder) | {"dataset": dataset, "validation": 4}
    (folder / CONFIG).write_text(yaml.safe_dump(settings), encoding="utf-8")


def test_one_student_of_all_rows_stands_beside_what_is_merged(tmp_path: Path) -> None:
    """It learns from the rows of both, as many tokens as both, holds out the run's own, and is planned so."""
    with composed(*MERGED, "merging.mixed=true", f"store={tmp_path / 'store'}") as cfg:
        config = resolve(cfg)
    here = Run(Store(tmp_path / "store"), Runtime(quiet=True), method(config))
    students = [json.loads((each.path / "training.json").read_text()) for each in here.parents]
    assert here.mixed is not None
    mixed = json.loads((here.mixed.path / "training.json").read_text())
    for count in ("examples", "supervised_tokens"):
        assert mixed[count] == sum(student[count] for student in students)
    names = [subject.name for subject in here.subjects]
    assert names == ["unpruned", "pruned", "recovered", "dataset=tiny_comparison", "mixed", "merged"]
    artifacts = RunArtifacts(here.base, here.pruned, [], [], student=here.student, mixed=here.mixed)
    built = artifacts.built()
    assert built["train"] == [here.student] and built["train_mixed"] == [here.mixed]
    told = trained(artifacts)
    assert told["mixed"]["supervised_tokens"] == mixed["supervised_tokens"] > told["supervised_tokens"] > 0
    assert f"{mixed['supervised_tokens']:,} supervised tokens" in dict(table.lines(told))["training, rows of all"]
    plan = Run(Plan(tmp_path / "store", []), Runtime(quiet=True), method(config))
    assert dict(plan._in_order())["mixed"] == here.mixed
    parts = {part.stage: part.learning for part in estimated(config).parts()}
    assert parts["train mixed"] > 1.5 * parts["train"] > 0


def test_a_training_of_several_runs_rows_is_as_long_as_theirs() -> None:
    """Epochs grow with the rows; tokens and steps are counted."""
    assert _longer({"budget": "examples", "epochs": 2}, 3) == {"budget": "examples", "epochs": 2}
    assert _longer({"budget": "tokens", "tokens": 10}, 3)["tokens"] == 30
    assert _longer({"budget": "steps", "steps": 10, "epochs": 1}, 2) == {
        "budget": "steps",
        "steps": 20,
        "epochs": 1,
    }


def test_a_plan_counts_what_the_students_take_once() -> None:
    """One of them is the run's own, which is trained and evaluated anyway."""
    with composed(*MERGED) as cfg:
        parts = estimated(resolve(cfg)).parts()
    found = Counter(part.stage for part in {part.key: part for part in parts}.values())
    assert found["train"] == found["evaluate recovered"] == 2 and found["evaluate merged"] == 1


def test_a_plan_counts_what_is_captured_for_every_student() -> None:
    with composed(*(each for each in MERGED if each != "loss=sft"), "loss=kd", "teacher_cache=64") as cfg:
        parts = estimated(resolve(cfg)).parts()
    assert len({part.key for part in parts if part.stage == "capture"}) == 2


def test_a_plan_counts_every_model_that_is_looked_at() -> None:
    """Drift and drafts of the other student, of the one of all rows and of the merged one too; their weights lie
    beside the unpruned ones, and on disk while they are merged."""
    with composed(*MERGED, "merging.mixed=true", "+drift=full", "+speculation=draft") as cfg:
        estimate = estimated(resolve(cfg))
    parts = {part.key: part for part in estimate.parts()}.values()
    stages = Counter(part.stage for part in parts)
    assert stages["drift recovered"] == 2 * stages["drift merged"] and stages["draft recovered"] == 4
    for kind in ("drift", "draft"):
        found = {stage for stage in stages if stage.startswith(kind)}
        assert found == {f"{kind} {name}" for name in ("pruned", "recovered", "mixed", "merged")}
    assert estimate.own_weights == estimate.pruned.weight_bytes
    assert estimate.disk()["while merging"] == 3 * estimate.disk()["merged"]


def test_the_models_of_students_are_found_as_that_of_the_run() -> None:
    """`model.dtype=auto` is the files' own in all of them, so that they are of one base."""
    with composed(*MERGED, "model.dtype=auto") as cfg:
        config = resolve(cfg)
    assert [each["model"] for each in config["merging"]["students"]] == [config["model"]] * 2
    verify(config)
