"""Write a run's recovered model as a plain Hugging Face folder, with the proof that it is the same model.

    sddx export run=outputs/.../summary.json to=my-model

run      the summary.json that a run names at its end, or its folder
to       the folder to write; it must not exist, or be empty
adapter  merged (default): one model that transformers and lm-eval load;
         apart: to/base, the pruned model, and to/adapter, a peft adapter on it
dtype    of the weights (default: the run's)
device   where the models run for the proof (default: cpu)
check    eval: evaluate what was written as the run evaluated its own, and count the items that flipped
push     org/name: upload the folder to the Hugging Face hub as well
private  whether that repository is private (default: true)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from sddx.config.arguments import REQUIRED, exit_status, one_of, plain_arguments


@exit_status
def main(arguments: Sequence[str] | None = None) -> int:
    """Export a run. Returns the exit status: 0, or 2 for a mistake of the user's."""
    argv = sys.argv[1:] if arguments is None else arguments
    defaults = {"adapter": "merged", "dtype": None, "device": "cpu", "check": None, "push": None, "private": "true"}
    values = plain_arguments(argv, __doc__, run=REQUIRED, to=REQUIRED, **defaults)
    one_of(values, "check", (None, "eval"))
    private = one_of(values, "private", ("true", "false")) == "true"
    one_of(values, "adapter", ("merged", "apart"))
    from sddx.export import push
    from sddx.export.proof import in_words
    from sddx.export.write import export

    if values["push"]:
        push.require(values["push"], values["adapter"], private=private)
    to = Path(values["to"]).expanduser().absolute()
    options = {name: values[name] for name in ("adapter", "dtype", "device")}
    proof = export(values["run"], to, **options, evaluated=values["check"] == "eval")
    print(in_words(proof))
    if values["push"]:
        print(push.push(to, values["push"], private=private))
    print(to)
    return 0


if __name__ == "__main__":
    sys.exit(main())
