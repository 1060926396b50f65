"""Which drafted tokens stay and what follows them (speculative decoding, arXiv 2211.17192), and what that is worth.

Lookahead k: the draft proposes k tokens, and the target reads them in one pass and adds a token of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sddx.records import Amounts


def greedy(drafted: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of drafted tokens [rows, k], how many stay, [rows], and the target's own token after them, [rows]: they stay
    up to the first that is not the target's likeliest. `logits` [rows, k + 1, vocabulary] are the target's."""
    chosen = logits.argmax(-1)
    accepted = (drafted == chosen[:, :-1]).long().cumprod(1).sum(1)
    return accepted, chosen.gather(1, accepted[:, None]).squeeze(1)


def sampled(drafted: Tensor, draft: Tensor, target: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The same for tokens that were drawn from probabilities q = `draft` [rows, k, vocabulary]; p = `target` [rows,
    k + 1, vocabulary] are the target's, so that what comes out is distributed by p.

    Token x stays with probability min(1, p(x) / q(x)); after the first that does not, the target's own is drawn
    from (p - q)+, after k that do from p (algorithm 1 of the paper). `uniforms` [rows, k + 1, 2] in [0, 1) decide:
    one whether a token stays, one which is drawn."""
    there = drafted[..., None]
    p, q = target[:, :-1].gather(-1, there).squeeze(-1), draft.gather(-1, there).squeeze(-1)
    accepted = (uniforms[:, :-1, 0] * q < p).long().cumprod(1).sum(1)
    rest = torch.cat([(target[:, :-1] - draft).clamp(min=0), target[:, -1:]], dim=1)
    rows = torch.arange(len(drafted), device=drafted.device)
    left, whole = rest[rows, accepted], target[rows, accepted]
    left = torch.where(left.sum(-1, keepdim=True) > 0, left, whole)  # p = q but for rounding
    return accepted, drawn(left, uniforms[rows, accepted, 1])


def drawn(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The token that each uniform number [...] in [0, 1) draws by weights [..., vocabulary], which need not sum to
    1: the first whose sum with all before it exceeds that share of the whole (inverse transform)."""
    heaped = weights.cumsum(-1)
    return (heaped <= uniforms[..., None] * heaped[..., -1:]).sum(-1)


@dataclass(frozen=True)
class Counts(Amounts):
    """What became of drafts: tokens of the text, passes of the target, drafted tokens that it read a verdict on
    (those behind a refused one get none), and those that stayed."""

    tokens: int = 0
    passes: int = 0
    tested: int = 0
    accepted: int = 0

    @property
    def rates(self) -> dict[str, float | None]:
        """Acceptance (accepted over tested), the mean accepted length of a pass without and with the target's own
        token, and the share of passes saved, of which plain decoding takes one a token. None of no text."""
        return {
            "acceptance": self.accepted / self.tested if self.tested else None,
            "accepted_length": self.accepted / self.passes if self.passes else None,
            "length": self.tokens / self.passes if self.passes else None,
            "saved": 1 - self.passes / self.tokens if self.tokens else None,
        }


def verdict(accepted: int, kept: int, lookahead: int) -> Counts:
    """Counts of one pass: `accepted` drafted tokens stayed, and of them and the target's own the text took `kept`,
    fewer where it ended before."""
    stayed = min(accepted, kept)
    return Counts(kept, 1, stayed + (kept > accepted and accepted < lookahead), stayed)


def forced(hits: Sequence[bool], lookahead: int) -> Counts:
    """What greedy drafts of a lookahead would come to on a text that the target wrote greedily: `hits` says for
    each of its tokens whether the draft's likeliest is the same, which one pass over the text tells for every
    lookahead."""
    total, at = Counts(), 0
    while at < len(hits):
        ahead = hits[at : at + lookahead]
        accepted = next((place for place, hit in enumerate(ahead) if not hit), len(ahead))
        kept = min(accepted + 1, len(hits) - at)
        total, at = total + verdict(accepted, kept, lookahead), at + kept
    return total


def speed_up(acceptance: float, lookahead: int, cost: float) -> float:
    """How many times as fast as plain decoding, where tokens stay independently of each other with probability
    `acceptance` and a step of the draft takes `cost` of the target's (theorem 3.8 of the paper); a pass over a
    whole draft is taken to last as long as one over a token."""
    if acceptance == 1:
        tokens: float = lookahead + 1
    else:
        tokens = (1 - acceptance ** (lookahead + 1)) / (1 - acceptance)
    return tokens / (cost * lookahead + 1)
