"""Resize uint8 frames, and cut them into patches in the layout of a vision tower."""
