"""Trains, measures and describes what ships of Toyland. It is not in the wheel, and nothing imports it."""
