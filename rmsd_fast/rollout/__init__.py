"""Rollout engines: responses of the student, sampled online."""
