"""Importance: which blocks change the hidden state least."""
