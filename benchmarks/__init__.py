"""How fast the project is, as ratios that say the same on a slow machine and on a fast one: `python -m benchmarks`.

A benchmark is an entry in `catalogue.BENCHMARKS`: a function that gives both sides of what is compared, on one model.
"""
