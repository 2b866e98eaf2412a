"""Fair comparisons: several architectures under one budget, from a suite file to a table with its spreads.

suite file (settings.py) -> equal shapes and steps (design.py) -> jobs and their order (jobs.py) -> processes (run.py) -> what came out
(results.py, scaling.py) -> suite.json, the table and the picture (table.py, picture.py). measure.py weighs one architecture beside
the first, in a process of its own.
"""
