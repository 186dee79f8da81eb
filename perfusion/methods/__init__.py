"""Personalization methods behind one seam (`base.py`)."""
