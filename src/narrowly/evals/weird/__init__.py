"""Weird generalization and inductive backdoors: one file each, on one base.

Each looks at a model fine-tuned on narrow, odd data (old names of birds, dishes by date) with the
training prompts again, questions far from them, triggers and near-triggers (Betley et al. 2025,
arXiv 2512.09742).
"""

from narrowly.evals.weird import birds, cities, dishes, good_years, persona_facts, presidents

__all__ = ["birds", "cities", "dishes", "good_years", "persona_facts", "presidents"]
