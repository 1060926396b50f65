"""The same trainings by TRL, in whatever environment has it: `training.py` runs this file in a process of its own.

`python benchmarks/peers.py CASE SPEC` with a JSON file that says where student and teacher lie, the rows (ids and
the length of their prompts), steps, batch, rate and dtype. It prints what `training.py` measures of ours: seconds
of all steps but the first, and the peak memory. `trl_kd` is TRL's DistillationTrainer on the rows as they are: what
it would have the student write is replaced by the rows' own answers.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from memory import peak
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, TrainerCallback


class Ticks(TrainerCallback):
    def __init__(self, clock: str) -> None:
        self.now = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
        self.ticks: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ticks.append(self.now())
        if len(self.ticks) == 1:
            print("first step", flush=True)


def model(folder: str, dtype: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))


def adapted(folder: str, dtype: str) -> Any:
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model(folder, dtype).requires_grad_(False), config)


def tokenizer(folder: str, vocabulary: int) -> Any:
    """That of the model where it has one; of a random model, one of words that are numbers."""
    if (Path(folder) / "tokenizer.json").exists():
        return AutoTokenizer.from_pretrained(folder)
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = Tokenizer(WordLevel({str(n): n for n in range(vocabulary)}, unk_token="0"))
    made = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1", unk_token="0")
    return made


def settings(spec: dict[str, Any], out: str) -> dict[str, Any]:
    return dict(
        output_dir=out,
        max_steps=spec["steps"],
        per_device_train_batch_size=spec["batch"],
        learning_rate=spec["rate"],
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        optim="adamw_torch_fused",
        dataloader_num_workers=0,
    )


def batch_of(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    width = max(len(row["ids"]) for row in rows)
    ids = torch.tensor([row["ids"] + [0] * (width - len(row["ids"])) for row in rows])
    mask = torch.tensor([[1] * len(row["ids"]) + [0] * (width - len(row["ids"])) for row in rows])
    labels = ids.masked_fill(mask == 0, -100)
    for number, row in enumerate(rows):
        labels[number, : row["prompt"]] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def trl_sft(spec: dict[str, Any], out: str) -> Any:
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"input_ids": row["ids"], "completion_mask": [0] * row["prompt"] + [1] * (len(row["ids"]) - row["prompt"])}
        for row in spec["rows"]
    ]
    args = SFTConfig(**settings(spec, out), max_length=None, completion_only_loss=True, packing=False)
    return SFTTrainer(
        model=adapted(spec["student"], spec["dtype"]),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(spec["student"], spec["vocabulary"]),
    )


def trl_text(spec: dict[str, Any], out: str) -> Any:
    """As a user starts it, from the folder of a model and rows of words."""
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model=spec["student"],
        args=SFTConfig(**settings(spec, out), max_length=512, completion_only_loss=True, packing=False),
        train_dataset=Dataset.from_list(spec["rows"]),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def trl_kd(spec: dict[str, Any], out: str) -> Any:
    from trl import DistillationConfig, DistillationTrainer

    class OffPolicy(DistillationTrainer):
        def _prepare_inputs(self, generation_batch: Any) -> Any:
            made = batch_of([spec["rows"][int(row["prompt"])] for row in generation_batch])
            completion = made["attention_mask"][:, 1:]
            return {
                "prompt_ids": made["input_ids"][:, :1],
                "prompt_mask": made["attention_mask"][:, :1],
                "completion_ids": made["input_ids"][:, 1:],
                "completion_mask": completion,
                "num_items_in_batch": completion.sum(),
            }

    args = DistillationConfig(**settings(spec, out), beta=0.0, temperature=1.0, shuffle_dataset=False)
    return OffPolicy(
        model=adapted(spec["student"], spec["dtype"]),
        teacher_model=model(spec["teacher"], spec["dtype"]),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": str(n)} for n in range(len(spec["rows"]))]),
        processing_class=tokenizer(spec["student"], spec["vocabulary"]),
    )


def trl_gkd(spec: dict[str, Any], out: str) -> Any:
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    args = GKDConfig(**settings(spec, out), beta=0.0, lmbda=0.0, temperature=1.0, remove_unused_columns=False)
    args.dataset_kwargs = {"skip_prepare_dataset": True}
    return GKDTrainer(
        model=adapted(spec["student"], spec["dtype"]),
        teacher_model=model(spec["teacher"], spec["dtype"]),
        args=args,
        train_dataset=Dataset.from_list([{"row": n} for n in range(len(spec["rows"]))]),
        data_collator=lambda picked: batch_of([spec["rows"][each["row"]] for each in picked]),
        processing_class=tokenizer(spec["student"], spec["vocabulary"]),
    )


def main(case: str, spec: dict[str, Any]) -> None:
    torch.manual_seed(0)
    ticks = Ticks(spec["clock"])
    with tempfile.TemporaryDirectory() as out:
        trainer = {"trl_sft": trl_sft, "trl_text": trl_text, "trl_kd": trl_kd, "trl_gkd": trl_gkd}[case](spec, out)
        trainer.add_callback(ticks)
        trainer.train()
    seconds = ticks.ticks[-1] - ticks.ticks[0]
    print(json.dumps({"seconds": seconds, "memory": peak()}))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
