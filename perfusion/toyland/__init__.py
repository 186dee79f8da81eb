"""Toyland: a small procedural world of captioned 64x64 scenes with exact object masks.

`world` samples scenes, `draw` renders them, `captions` words them. Everything is a pure function of its seed.
"""
