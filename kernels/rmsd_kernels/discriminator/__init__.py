"""Losses of the discriminator: value head on the last tokens, and the quality-weighted pairwise loss."""
