"""Resize of uint8 frames, and their patches as a vision tower takes them."""
