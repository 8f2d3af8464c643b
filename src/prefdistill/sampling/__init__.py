"""Responses from a model, in memory or as a data file."""
