"""Evaluation of a student on held-out data: metrics, error bars and the verdict on a comparison."""
