"""How well agreement between the answers of a teacher replaces ground truths."""
