"""Attention of groups of responses that share a prompt, in training and in decoding."""
