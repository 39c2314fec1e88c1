"""Losses of a language-model head straight from hidden states."""
