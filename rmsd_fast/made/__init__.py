"""Generated material: clips, questions, a simulated teacher and a tiny student."""
