"""Preference pairs: loading, templates, tokens, batches."""
