"""Resizing of uint8 frames, and their patches in the layout that a vision tower takes."""
