"""sddx: cut layers out of a language model, let it teach itself, measure what came back."""

__version__ = "0.1.0"
