"""`sddx <command>`: the commands by their names, each a module of this room."""

from __future__ import annotations

import runpy
import sys

from sddx.errors import near

COMMANDS = {
    "train": ("sddx.train", "prune a model, let it teach itself, measure what came back; --multirun for a grid"),
    "plan": ("sddx.commands.plan", "what a run or a grid will cost, before anything is downloaded"),
    "fetch": ("sddx.commands.fetch", "all that a run or a grid needs from the network"),
    "sweep": ("sddx.commands.sweep", "the cells of a sweep, and what became of each"),
    "report": ("sddx.commands.report", "tables and figures of finished runs"),
    "compare": ("sddx.commands.compare", "two runs side by side, item by item"),
    "bench": ("sddx.commands.bench", "what pruning buys in time and memory on this machine"),
    "pace": ("sddx.commands.pace", "the steps that each arm takes in equal seconds, from short runs"),
    "export": ("sddx.commands.export", "a recovered model as a plain folder, proven equal"),
    "families": ("sddx.commands.families", "which families of models can be pruned, and what each allows"),
    "store": ("sddx.commands.store", "what the store holds, what it takes, and why a stage is built again"),
    "pretrain": ("sddx.tiny.pretrain", "the embedded model, from nothing"),
}


def main() -> int:
    """Run the command that the first argument names. Returns the exit status: 2 where there is none."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        asked = name in ("", "-h", "--help")
        listed = "\n".join(f"  {each:<9} {about}" for each, (_, about) in COMMANDS.items())
        wrong = "" if asked else f"error: {name} is no command.{near(name, list(COMMANDS), '')}\n"
        print(f"{wrong}sddx <command> [arguments]\n{listed}", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    sys.argv[:2] = [f"sddx {name}"]
    runpy.run_module(COMMANDS[name][0], run_name="__main__", alter_sys=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
