"""The formulas of the method: answers, quality, matching, rewards, advantages.

All functions are pure: they use no files, no models and no global random state, and only torch and the standard
library.
"""
