"""Scores of generated images. May import `perfusion`; nothing in `perfusion` imports this package."""
