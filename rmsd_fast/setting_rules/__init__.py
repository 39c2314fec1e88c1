"""Check combinations of settings: what they require, which are incompatible, and which have no effect."""
