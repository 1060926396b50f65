"""How the models of lm-eval read their prompts: as the same tokens that scoring, self-data and training see.

Behaviour that is relied on was read in lm-eval 0.4.13.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from sddx.data.encode import conversation, padding_id, plain_ids, token_ids
from sddx.errors import UserError
from sddx.evaluation.likelihoods import is_packable, likelihoods
from sddx.evaluation.tasks import new_tokens

Scored = tuple[tuple[str, str] | None, list[int], list[int]]
_log = logging.getLogger(__name__)
BEFORE = 8  # tokens that a tokenizer puts before a text, with room to spare


class SameTokens:
    """Goes before a model class of lm-eval and renders and encodes by `sddx.data.encode`, in place of lm-eval's own
    rules: these also put what the tokenizer appends to a text between a prompt and its answer."""

    tokenizer: Any
    prefix_token_id: int

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as one text in the model's template, ready to be answered if a turn is to be
        generated."""
        return conversation(self.tokenizer, chat_history, unfinished=not add_generation_prompt)

    def tok_encode(
        self,
        string: Any,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **unused: Any,
    ) -> Any:
        """The tokens of a text, or of each of several; no begin token where `add_special_tokens` is False."""
        texts = [string] if isinstance(string, str) else list(string)
        if add_special_tokens is False:
            rows = [plain_ids(self.tokenizer, text) for text in texts]
        else:
            rows = token_ids(self.tokenizer, texts)
        rows = [row[-left_truncate_len:] for row in rows] if left_truncate_len else rows
        return rows[0] if isinstance(string, str) else rows

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Both as the tokens of the whole, parted where the context alone has others. White space at the end of the
        context goes to the continuation, which is lm-eval's rule."""
        bare = context.rstrip()
        alone, whole = self.tok_encode([bare, context + continuation])
        pairs = enumerate(zip(alone, whole, strict=False))
        at = next((place for place, (a, b) in pairs if a != b), min(len(alone), len(whole)))
        return whole[:at] or [self.prefix_token_id], whole[at:]


class SameTokensHFLM(SameTokens, HFLM):
    """lm-eval's model around one of transformers, which it leaves as it is."""

    def tok_batch_encode(
        self,
        strings: Sequence[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask [batch, time] of prompts, padded on the left."""
        rows = self.tok_encode(strings, left_truncate_len=left_truncate_len)
        width, pad = max(map(len, rows)), padding_id(self.tokenizer)
        ids = [[pad] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(ids), torch.tensor(mask)

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether it is greedy, in the order of the requests; by
        `likelihoods` where that holds, and where the batch size allows that texts are read together. A context that
        is too long is cut on the left, as lm-eval does. Raises UserError as `require_answers_fit` does."""
        require_answers_fit(requests, self.max_length)
        texts = [(context + continuation)[-self.max_length - 1 : -1] for _, context, continuation in requests]
        longest = max(map(len, texts), default=0)
        together = self.backend == "causal" and self.batch_size != 1 and len(texts) > 1
        if not together or not is_packable(self.model, longest):
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        asked = [(text, request[2]) for text, request in zip(texts, requests, strict=True)]
        answers: dict[int, tuple[float, bool]] = {}
        silent = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), disable=silent, desc="Running loglikelihood requests") as bar:
            for number, answer in likelihoods(self.model, asked):
                answers[number] = answer
                if requests[number][0] is not None:  # a window of a longer text
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
                bar.update()
        return [answers[number] for number in range(len(requests))]


class Reader(SameTokens):
    """Reads prompts for a model of this context, and answers none."""

    def __init__(self, tokenizer: Any, context: int) -> None:
        self.tokenizer, self.max_length = tokenizer, context

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """No answers: the requests were read when they were made."""
        return []


class Fitting:
    """A model of lm-eval that looks at all prompts before it answers the first. lm-eval cuts one that does not fit
    the context beside its answer on the left, where the question and its examples begin; how many requests of each
    task, is in `cut`. `spare`: the tokens that a text which is only scored may have beyond the context."""

    def __init__(self, lm: Any, spare: int) -> None:
        self.lm, self.spare = lm, spare
        self.cut: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lm, name)

    def loglikelihood(self, requests: Sequence[Instance], **options: Any) -> list[Any]:
        """The model's own answers, after all requests were looked at. Raises UserError as `require_fit` does."""
        room = self.lm.max_length + self.spare
        self._look((each, "".join(each.args), room) for each in requests)
        return self.lm.loglikelihood(requests, **options)

    def generate_until(self, requests: Sequence[Instance], **options: Any) -> list[Any]:
        """The same for answers that are written: a prompt must leave room for its answer."""
        rooms = (self.lm.max_length - new_tokens(each.args[1]) for each in requests)
        self._look((each, each.args[0], room) for each, room in zip(requests, rooms, strict=True))
        return self.lm.generate_until(requests, **options)

    def _look(self, asked: Iterable[tuple[Instance, str, int]]) -> None:
        """Count the requests whose text has more tokens than there is room for. Raises UserError as `require_fit`
        does."""
        total, cut = Counter[str](), Counter[str]()
        for request, text, room in asked:
            total[str(request.task_name)] += 1
            # A token but those before the text is a byte at least, and most texts have room for their bytes.
            if len(text.encode()) + BEFORE > room and len(self.lm.tok_encode(text)) > room:
                cut[str(request.task_name)] += 1
        require_fit(cut, total, self.lm.max_length)
        self.cut += cut
        for task, count in cut.items():
            message = "%s: %d of %d requests do not fit the model's context of %d tokens, and lose their beginning."
            _log.warning(message, task, count, total[task], self.lm.max_length)


def require_answers_fit(requests: Iterable[Scored], context: int) -> None:
    """Raises UserError for continuations that cannot be scored: of no token, or of more than the model's context
    has."""
    wrong = [(texts or ("", ""), len(answer)) for texts, _, answer in requests if not 0 < len(answer) <= context]
    if wrong:
        (prompt, answer), length = wrong[0]
        more = f" So it is with {len(wrong) - 1} more." if len(wrong) > 1 else ""
        raise UserError(
            f"The answer {answer[:60]!r} to {prompt[:60]!r} has {length} tokens, and must have 1 to {context}, the "
            f"model's context.{more} Mend the choices or the targets of its task."
        )


def require_fit(cut: Mapping[str, int], total: Mapping[str, int], context: int) -> None:
    """Raises UserError for tasks of whose requests more than half would be cut: what is evaluated then is another
    task."""
    wrong = [
        f"The task {task!r} does not fit the model: {count} of {total[task]} requests are longer than its context "
        f"of {context} tokens, answer included, and would lose their beginning. Ask for fewer tokens in an answer "
        "(evaluation.max_new_tokens) or fewer examples (evaluation.shots)."
        for task, count in cut.items()
        if 2 * count > total[task]
    ]
    if wrong:
        raise UserError(*wrong)
