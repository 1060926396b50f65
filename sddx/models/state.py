"""What a body hands to a head."""

from __future__ import annotations

from transformers.modeling_outputs import BaseModelOutputWithPast


class State(BaseModelOutputWithPast):
    """A final hidden state without anything else that a body may give."""

    def __getattr__(self, name: str) -> None:
        return None
