"""Material that the program makes itself: clips, questions, a simulated teacher and a tiny student."""
