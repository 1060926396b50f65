"""Rewriting templates: how the unpruned model is asked to write a reference answer anew, and what gives it
away.

Three kinds as in SDFT (arXiv 2402.13669: system line, task, reference answer, response), in our own words and as a
single user turn, so that any chat template can carry them.
"""

from __future__ import annotations

import re
from difflib import get_close_matches

from sddx.errors import UserError

TEMPLATES = {
    "math": (
        "You are a careful mathematician. Below is a problem, followed by a reference answer to it. Use the "
        "reference to be sure of the result, then solve the problem yourself, step by step, and state the "
        "final number at the end.\n\nProblem:\n{prompt}\n\nReference answer:\n{reference}\n\n"
        "Write only the solution, as if no reference had been given."
    ),
    "instruction": (
        "Below is a request, followed by a reference answer to it. Let the reference guide you in what to "
        "say, and answer the request in the way that you would naturally phrase it.\n\nRequest:\n{prompt}\n\n"
        "Reference answer:\n{reference}\n\nWrite only the answer, as if no reference had been given."
    ),
    "code": (
        "You are an experienced programmer. Below is a task, followed by a reference answer to it. Keep its "
        "behaviour, names and signatures where the task asks for them, and write the program as you would "
        "write it.\n\nTask:\n{prompt}\n\nReference answer:\n{reference}\n\n"
        "Write only the program with what needs explaining, as if no reference had been given."
    ),
    "tiny": "{prompt} Reference: {reference} Rewrite the reference in your own words.",
}

# What gives a template away, with the words of it that are spoken of; without any, it does so of every template.
_LEAKS = {
    "reference answer": "reference answer",
    "reference:": "reference:",
    "as if no reference": "as if no reference",
    "your own words": "your own words",
    "my own words": "your own words",
    "your response": "",
    "my response": "",
    "your own response": "",
    "my own response": "",
    "now it's your turn": "",
}


# LaTeX's commands that begin with n.
_LATEX = (
    "abla|atural|e|earrow|eg|eq|ewline|exists|geq?|i|leq?|mid|olimits|onumber|ot|otin|parallel|rightarrow|u|warrow"
)


def line_breaks(template: str) -> str:
    """A template whose backslash-n, as a shell or an unquoted YAML text leaves it, are line breaks; `\\nabla` and
    LaTeX's other commands stay, and so does what stands after another backslash."""
    return re.sub(rf"(?<!\\)\\n(?!(?:{_LATEX})(?![A-Za-z]))", "\n", template)


def rewriting_prompt(kind: str, prompt: str, reference: str) -> str:
    """One user turn that shows the prompt and its reference answer and asks for the model's own answer.

    `kind` names one of TEMPLATES, or is itself a template that holds {prompt} and {reference}.
    Raises UserError for any other kind.
    """
    template = TEMPLATES.get(kind, line_breaks(kind))
    if "{prompt}" not in template or "{reference}" not in template:
        near = get_close_matches(kind, TEMPLATES, n=3) or sorted(TEMPLATES)
        raise UserError(
            f"There is no rewriting template {kind!r}. Near names: {', '.join(near)}. Set dataset.rewrite to "
            f"one of {', '.join(sorted(TEMPLATES))}, or to a text of your own that holds {{prompt}} and "
            f"{{reference}}."
        )
    texts = {"prompt": prompt, "reference": reference}
    return re.sub(r"\{(prompt|reference)\}", lambda field: texts[field[1]], template)


def leaks(answer: str, kind: str | None = None) -> bool:
    """Whether an answer gives the rewriting template of this kind away (None: any of ours), or is empty: it speaks
    of the reference in the template's words, of its own response, or hands the turn back. SDFT's filter
    (arXiv 2402.13669), with the words of our own templates added."""
    text = re.sub(r"\s+", " ", answer).strip().lower().replace("’", "'").replace(" :", ":")
    template = None if kind is None else TEMPLATES.get(kind, kind).lower()
    phrases = [phrase for phrase, said in _LEAKS.items() if template is None or said in template]
    return not text or text.startswith("your turn") or any(phrase in text for phrase in phrases)
