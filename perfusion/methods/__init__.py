"""Personalization methods behind one seam (`base.py`); those of folders that PERFUSION_METHODS names are among them."""

import os

__path__ += filter(None, os.environ.get("PERFUSION_METHODS", "").split(os.pathsep))
