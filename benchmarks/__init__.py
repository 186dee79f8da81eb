"""How fast the project is, as ratios that say the same on a slow machine and on a fast one: `python -m benchmarks`.

A benchmark is a generator `pairs(device)`, which builds each `timing.Pair` just before it is measured, and an entry in
`catalogue.BENCHMARKS`.
"""
