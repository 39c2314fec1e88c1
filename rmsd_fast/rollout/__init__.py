"""Rollout engines, which sample responses of the student online."""
