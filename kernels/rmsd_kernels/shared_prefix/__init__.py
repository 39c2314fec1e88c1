"""Attention for groups of responses that share a prompt, in training and in decoding."""
