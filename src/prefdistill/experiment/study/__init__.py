"""Studies: one recipe, run with some of its options varied, and the results side by side.

A study is a file: a question, a recipe, and the cells to run. A cell is one run of the recipe with one seed; its result
is one JSON file. Only cells that are missing or stale are run, so that a study can be interrupted, and seeds and cells
added. Steps that are the same in several cells are done once (the pool of `run_stage`).
"""
