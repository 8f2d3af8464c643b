"""Answers judged by a language model behind an OpenAI-compatible endpoint: MT-Bench and AlpacaEval."""
