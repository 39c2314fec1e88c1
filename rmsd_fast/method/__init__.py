"""The formulas of the method: answers, quality, matching, rewards, advantages.

Pure functions of their arguments: no files, no model, no global random state; torch and the standard library only.
"""
