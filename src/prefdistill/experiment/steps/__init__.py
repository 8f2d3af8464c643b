"""The steps of a run, one module for each part of the pipeline. `plan.py` says which of them a recipe needs."""
