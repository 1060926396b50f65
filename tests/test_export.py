"""Laws of export: what stock loaders read is the recovered model, or nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import forked
import httpx
import pytest
import torch
from composing import SMALL, composed, resolve
from fakehub import serve
from families import ALL_FAMILIES, build, tokens
from safetensors.torch import load_file, save_file
from stock import logits
from transformers import AutoConfig, AutoModelForCausalLM

import sddx
from sddx.commands.export import main
from sddx.compression.junction import Gap, Junction
from sddx.compression.patches import Map
from sddx.compression.remove import Removal, apply_cut
from sddx.errors import UserError
from sddx.export.card import _without_paths
from sddx.export.formats import inspect_model
from sddx.export.write import require_stock
from sddx.models.load import load_model
from sddx.records import Cut
from sddx.students.plain import own_config
from sddx.students.recovered import Recovered
from sddx.train import run

pytestmark = pytest.mark.runs

CHECKPOINT = Path(sddx.__file__).parent / "tiny" / "checkpoint"
IDS = torch.arange(40)[None]
SHORT = ("loss=sft", "trainer.budget=steps", "trainer.steps=2", "trainer.learning_rate=1e-2")


def job(out: Path, store: Path, *overrides: str) -> Path:
    """One small run; returns the path of its summary."""
    with composed(*SMALL, *SHORT, f"store={store}", *overrides, out=out) as cfg:
        return run(resolve(cfg), out)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shared_store: Path) -> SimpleNamespace:
    """A finished LoRA run, and a function that makes others."""
    out = tmp_path_factory.mktemp("runs")
    made = lambda name, *overrides: job(out / name, shared_store, *overrides)  # noqa: E731
    return SimpleNamespace(first=made("first"), make=made)


def export(summary: Path, to: Path, *given: str) -> dict:
    """What the entry point writes as proof; it must succeed."""
    assert main([f"run={summary}", f"to={to}", *given]) == 0
    return json.loads((to / "proof.json").read_text())


def stock(folder: Path, adapter: Path | None, out: Path) -> torch.Tensor:
    """The logits of a folder in a process that knows nothing of ours."""
    process = forked.started(logits, folder, adapter, out, cwd=out.parent, err=out.with_suffix(".err"))
    process.join(120)
    assert process.exitcode == 0, out.with_suffix(".err").read_text()
    return torch.load(out)


def test_an_adapter_apart_is_the_same_model_bit_for_bit(runs: SimpleNamespace, tmp_path: Path) -> None:
    """In another process, with peft and transformers alone; the adapter names the base that it belongs to."""
    to = tmp_path / "apart"
    assert export(runs.first, to, "adapter=apart")["equal"]
    model, _ = sddx.load(runs.first)
    assert torch.equal(stock(to / "base", to / "adapter", tmp_path / "logits"), model(IDS).logits)
    named = json.loads((to / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(named) == to / "base"
    pruned = AutoModelForCausalLM.from_pretrained(named)
    assert not torch.allclose(pruned(IDS).logits, model(IDS).logits)


def test_a_merged_model_differs_by_rounding(runs: SimpleNamespace, tmp_path: Path) -> None:
    to = tmp_path / "merged"
    proof = export(runs.first, to)
    expected = sddx.load(runs.first)[0](IDS).logits
    found = stock(to, None, tmp_path / "logits")
    assert (found - expected).abs().max() <= 1e-4
    assert proof["flipped_greedy_tokens"] == 0 and proof["dtype"] == "float32"


def test_merged_weights_are_the_kept_blocks_plus_the_adapters_product(
    runs: SimpleNamespace, tmp_path: Path
) -> None:
    """Computed here from the base model's file and the adapter's: block j is block kept[j] plus alpha / r B A."""
    export(runs.first, tmp_path / "merged", "dtype=bfloat16")
    summary = json.loads(runs.first.read_text())
    base, merged = (load_file(folder / "model.safetensors") for folder in (CHECKPOINT, tmp_path / "merged"))
    place = next(Path(summary["store"]).glob(f"train/*/{summary['artifacts']['train']}"))
    lora, scale = load_file(place / "adapter_model.safetensors"), 16 / 8
    assert len(merged) == sum("layers" not in name for name in base) + 9 * sum(".0." in name for name in base)
    for new, old in enumerate(summary["cut"]):
        for name in ("self_attn.q_proj", "mlp.down_proj"):
            a, b = (lora[f"base_model.model.model.layers.{new}.{name}.lora_{half}.weight"] for half in "AB")
            wanted = base[f"model.layers.{old}.{name}.weight"].float() + scale * (b @ a)
            assert torch.equal(merged[f"model.layers.{new}.{name}.weight"], wanted.bfloat16())


def test_half_precision_says_what_it_moved(
    runs: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The largest difference and the flipped tokens are measured, printed and kept."""
    proof = export(runs.first, tmp_path / "merged", "dtype=bfloat16")
    expected, found = (
        model(IDS).logits.float()
        for model in (sddx.load(runs.first, dtype="bfloat16")[0], load_model(tmp_path / "merged", dtype="bfloat16"))
    )
    assert 0 < (found - expected).abs().max() <= 2 * proof["largest_difference"]
    assert f"{proof['flipped_greedy_tokens']} of {proof['tokens']} greedy tokens" in capsys.readouterr().out


def test_lm_eval_reads_the_folder(runs: SimpleNamespace, tmp_path: Path) -> None:
    """Its own model class, and the run's evaluation repeated on it: no item flips."""
    from lm_eval.models.huggingface import HFLM

    proof = export(runs.first, tmp_path / "merged", "check=eval")
    assert {name: task["flipped"] for name, task in proof["evaluation"].items()} == {
        "tiny_arithmetic": [0, 0],
        "tiny_facts": [0, 0],
    }
    loaded = HFLM(pretrained=str(tmp_path / "merged"), device="cpu", dtype="float32")
    assert loaded.model.config.num_hidden_layers == 9
    assert torch.equal(loaded.model(IDS).logits, load_model(tmp_path / "merged")(IDS).logits)


PLAIN = {
    "all weights": ["tuning=full", "trainer.learning_rate=1e-4"],
    "a folded map": ["pruning/patch=linear_ffn"],
    "a folded constant": ["pruning/patch=mean", "pruning.patch.fold=true"],
    "a retrained block": ["pruning/patch=block", "pruning.patch.fit.epochs=1", "pruning.patch.trained=true"],
    "nothing removed": ["pruning.remove=0"],
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_became_plain_weights_is_exported(name: str, runs: SimpleNamespace, tmp_path: Path) -> None:
    summary = runs.make(name, *PLAIN[name])
    proof = export(summary, tmp_path / "merged")
    expected = sddx.load(summary)[0](IDS).logits
    assert (load_model(tmp_path / "merged")(IDS).logits - expected).abs().max() <= 1e-4 * proof["largest_logit"]
    if name == "all weights":
        assert proof["equal"]
        assert main([f"run={summary}", f"to={tmp_path / 'apart'}", "adapter=apart"]) == 2
    else:
        assert export(summary, tmp_path / "apart", "adapter=apart")["equal"]


FOREIGN = {
    "branches are gone": (Cut((0, 1, 2, 3), 4, no_attention=(1,)), False, ["4L-1A", "sddx.load"]),
    "a patch stands apart": (Cut((0, 3), 4), True, ["linear", "module of its own", "sddx.load"]),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_no_stock_loader_builds_is_refused(name: str, tmp_path: Path) -> None:
    """With the reason, and with what does load it."""
    cut, patched, said = FOREIGN[name]
    patches = (Junction({Gap("blocks", 1, 3): Map(matrix=torch.eye(2))}),) if patched else ()
    summary = {"choices": {"patch": "linear"}}
    with pytest.raises(UserError) as caught:
        require_stock(Recovered(tmp_path, summary, tmp_path, (Removal(cut), *patches), tmp_path))
    assert all(part in str(caught.value) for part in said)


def refused(capsys: pytest.CaptureFixture, to: Path, given: list[str], said: list[str]) -> None:
    """Status 2, a message, and nothing new on disk."""
    before = sorted(to.parent.rglob("*"))
    capsys.readouterr()
    assert main([f"to={to}", *given]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and all(part in message for part in said), message
    assert sorted(to.parent.rglob("*")) == before


def test_mistakes_are_told_and_nothing_is_overwritten(
    runs: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    given = f"run={runs.first}"
    for to, arguments, said in (
        ("mine", [given], ["mine", "not empty"]),
        ("file", [given], ["file", "not empty"]),
        ("file/inside", [given], ["cannot be written"]),
        ("new", [given, "adaptor=apart"], ["adaptor", "Did you mean adapter?"]),
        ("new", [given, "adapter=half"], ["half", "merged, apart"]),
        ("new", [given, "dtype=int4"], ["int4", "bfloat16"]),
        ("new", [given, "check=all"], ["all", "eval"]),
        ("new", [given, "device=tpu"], ["tpu", "device=auto"]),
        ("new", [given, "device=cuda:99"], ["cuda:99", "device=cpu"]),
        ("new", ["run=/no/where"], ["/no/where", "summary.json"]),
        ("new", [], ["run has no value"]),
    ):
        refused(capsys, tmp_path / to, arguments, said)


def test_a_full_disk_is_told_before_any_model_is_loaded(
    runs: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The room that is asked for is that of the weights, to the kilobyte, in the dtype that is written."""
    export(runs.first, tmp_path / "to", "dtype=bfloat16")
    size = (tmp_path / "to" / "model.safetensors").stat().st_size
    for free, fits in ((size, True), (size - 20_000, False)):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        if fits:
            export(runs.first, tmp_path / "again", "dtype=bfloat16")
        else:
            given = [f"run={runs.first}", "dtype=bfloat16"]
            refused(capsys, tmp_path / "new" / "folder", given, ["Make room", str(tmp_path)])


def test_another_base_model_is_refused(
    runs: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Its files may have changed under the same path since the run."""
    import shutil

    other = shutil.copytree(CHECKPOINT, tmp_path / "base")
    (other / "chat_template.jinja").write_text("another")
    summary = tmp_path / "summary.json"
    summary.write_text(json.dumps(json.loads(runs.first.read_text()) | {"model_path": str(other)}))
    refused(capsys, tmp_path / "to", [f"run={summary}"], ["not the one that the run used"])


def test_a_folder_that_was_filled_meanwhile_stays(
    runs: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = tmp_path / "to"

    def meanwhile(run: object) -> dict:
        to.mkdir()
        (to / "notes.txt").write_text("keep")
        return {}

    monkeypatch.setattr("sddx.export.card.record", meanwhile)
    assert main([f"run={runs.first}", f"to={to}"]) == 2
    assert "meanwhile" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["to", "notes.txt"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_failed_proof_leaves_nothing(
    dtype: str,
    runs: SimpleNamespace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two blocks that changed places on disk are found out in either precision."""

    def swapped(base: Path, folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        for name in [name for name in weights if ".layers.3." in name]:
            other = name.replace(".3.", ".7.")
            weights[name], weights[other] = weights[other], weights[name]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr("sddx.students.plain.own_config", swapped)
    refused(capsys, tmp_path / "to", [f"run={runs.first}", f"dtype={dtype}"], ["not the recovered one"])


def test_the_card_says_what_was_done_and_no_path_of_this_machine(runs: SimpleNamespace, tmp_path: Path) -> None:
    to = tmp_path / "merged"
    export(runs.first, to)
    card = (to / "README.md").read_text()
    for part in (
        "license: apache-2.0", "3 of 12", "tiny_arithmetic, 48 rows, seed 0", "loss sft", "95 % interval",
        "not yet run", "torch", "unpruned",
    ):  # fmt: skip
        assert part in card
    assert _without_paths({"teacher": "/home/me/teacher", "removed": 3}) == {"teacher": "teacher", "removed": 3}
    summary, kept = json.loads(runs.first.read_text()), json.loads((to / "sddx.json").read_text())
    assert kept["cut"]["kept"] == summary["cut"] and kept["artifacts"] == summary["artifacts"]
    assert kept["summary"]["scores"] == summary["scores"]
    for file in (path for path in to.iterdir() if path.suffix != ".safetensors"):
        assert summary["store"] not in file.read_text() and str(CHECKPOINT) not in file.read_text()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (to / name).read_bytes() == (CHECKPOINT / name).read_bytes()


def test_a_hub_models_licence_goes_with_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloaded with the model, named on the card, and beside the weights; the card of the base stays behind."""
    hub, store = serve(tmp_path, monkeypatch), tmp_path / "store"
    card = "---\nlicense: llama3.1\nextra_gated_prompt: no\n---\n# The base"
    hub.repositories["org/base"] = {path.name: path.read_bytes() for path in CHECKPOINT.iterdir()} | {
        "README.md": card.encode(), "LICENSE": b"the terms", "USE_POLICY.md": b"the policy"
    }  # fmt: skip
    summary = job(tmp_path / "run", store, "model=local", "model.path=org/base", "loss=none")
    export(summary, to := tmp_path / "to")
    written = (to / "README.md").read_text()
    for part in ("base_model: org/base", "license: llama3.1", "licence: llama3.1 (the base model's)"):
        assert part in written
    assert "The base" not in written and "extra_gated" not in written
    assert (to / "LICENSE").read_text() == "the terms" and (to / "USE_POLICY.md").read_text() == "the policy"


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_family_comes_back_from_a_folder_that_runtimes_can_read(family: str, tmp_path: Path) -> None:
    """Its depth and its per-layer lists are cut; a config that the pruned model does not fit is found out."""
    build(family).save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base", attention="eager")
    apply_cut(model, Cut.without({1, 3}, 5))
    model.save_pretrained(tmp_path / "to")
    (tmp_path / "to" / "tokenizer.json").write_text("{}")
    own_config(tmp_path / "base", tmp_path / "to")
    assert inspect_model(tmp_path / "to")["blocks"] == 3
    assert torch.equal(load_model(tmp_path / "to", attention="eager")(tokens()).logits, model(tokens()).logits)
    path = tmp_path / "to" / "config.json"
    depth = next(name for name in json.loads(path.read_text()) if name in ("num_hidden_layers", "n_layers"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {depth: 5, "layer_types": None}))
    with pytest.raises(UserError, match="blocks"):
        inspect_model(tmp_path / "to")


def test_a_text_model_beside_others_is_looked_at(tmp_path: Path) -> None:
    """Its depth and its lists, which stand in a config within the config."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16)
    config = Gemma3Config(text_config=build("gemma3").config.to_dict(), vision_config={**vision, "patch_size": 8})
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    found = inspect_model(tmp_path)
    assert found["blocks"] == 5 and found["per_layer_lists"] == ["layer_types"]


def test_a_config_keeps_the_form_that_the_base_model_has(tmp_path: Path) -> None:
    """Older readers look for `rope_theta` and take a default in its absence; transformers 5 writes it elsewhere."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    old = {"rope_theta": 500000.0, "torch_dtype": "bfloat16", "auto_map": {"AutoConfig": "own.Config"}}
    old["rope_scaling"] = scaling | {"original_max_position_embeddings": 64}
    build("llama").save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    fields = {
        key: value for key, value in json.loads(path.read_text()).items() if key not in ("rope_parameters", "dtype")
    }
    path.write_text(json.dumps(fields | old))
    model = load_model(tmp_path / "base")
    apply_cut(model, Cut.without({2}, 5))
    model.save_pretrained(tmp_path / "to")
    expected = AutoConfig.from_pretrained(tmp_path / "to")
    own_config(tmp_path / "base", tmp_path / "to")
    written = json.loads((tmp_path / "to" / "config.json").read_text())
    assert written["rope_theta"] == 500000.0 and written["rope_scaling"] == old["rope_scaling"]
    assert written["torch_dtype"] == "float32" and written["num_hidden_layers"] == 4 and "auto_map" not in written
    assert AutoConfig.from_pretrained(tmp_path / "to").rope_parameters == expected.rope_parameters


class Hub:
    """Stands for HfApi and notes what is asked of it. The repository exists where there are `files` (or an empty
    list); `down` is the first call from which on the hub cannot be reached."""

    def __init__(self, files: list[str] | None = None, private: bool = False, down: int = 100) -> None:
        self.files, self.private, self.left, self.calls = files, private, down, []

    def __call__(self) -> Hub:
        return self

    def repo_exists(self, name: str) -> bool:
        self.left -= 1
        if self.left < 0:
            raise httpx.ConnectError("no route to the hub")
        return self.files is not None

    def model_info(self, name: str) -> SimpleNamespace:
        siblings = [SimpleNamespace(rfilename=file) for file in self.files or []]
        return SimpleNamespace(private=self.private, siblings=siblings)

    def create_repo(self, name: str, **how: object) -> None:
        self.calls.append(("create", name, how["private"]))

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        self.calls.append(("upload", repo_id, (Path(folder_path) / "proof.json").is_file()))


def test_a_push_is_private_and_asked_for(
    runs: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Only with push=, after the proof; a hub that goes down meanwhile leaves the finished folder, and the command
    that uploads it, as private as it was to be."""
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    monkeypatch.setattr("huggingface_hub.HfApi", hub := Hub())
    export(runs.first, tmp_path / "kept")
    assert hub.calls == [] and hub.left == 100
    export(runs.first, tmp_path / "pushed", "push=org/name")
    export(runs.first, tmp_path / "open", "push=org/name", "private=false")
    assert hub.calls == [
        ("create", "org/name", True), ("upload", "org/name", True),
        ("create", "org/name", False), ("upload", "org/name", True),
    ]  # fmt: skip
    monkeypatch.setattr("huggingface_hub.HfApi", hub := Hub(down=1))
    to = tmp_path / "local"
    assert main([f"run={runs.first}", f"to={to}", "push=org/name"]) == 2
    message = capsys.readouterr().err
    assert "no route" in message and f"hf upload org/name {to} --private" in message
    assert (to / "proof.json").is_file() and hub.calls == []


def test_a_push_that_cannot_succeed_is_refused_before_work(
    runs: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A private model never goes into a repository that is public, nor any into one that holds something."""
    given, to = f"run={runs.first}", tmp_path / "to"
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    refused(capsys, to, [given, "push=org/name"], ["hf auth login"])
    refused(capsys, to, [given, "push=a name"], ["a name", "org/name"])
    refused(capsys, to, [given, "push=org/name", "adapter=apart"], ["adapter=merged"])
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    for hub, said in (
        (Hub(down=0), ["no route", "leave push=... out"]),
        (Hub(["config.json"], private=True), ["not empty", "another name"]),
        (Hub([".gitattributes"]), ["is public", "private=false"]),
    ):
        monkeypatch.setattr("huggingface_hub.HfApi", hub)
        refused(capsys, to, [given, "push=org/name"], said)
        assert hub.calls == []
