"""What a concept means, and how sure that is: contexts, explainers, scorers."""

from narrowly.explain.record import Example, Explained, ExplainedLatent, Explanation, load_explained

__all__ = ["Example", "Explained", "ExplainedLatent", "Explanation", "load_explained"]
