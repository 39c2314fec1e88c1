"""Losses of a language-model head, computed from hidden states."""
