"""A page in the browser that teaches, draws and compares concepts: `python -m perfusion.studio`."""
