"""What `python -m perfusion.train --help` says: what Hydra would say, without the time that importing it takes."""

from __future__ import annotations

import yaml

from perfusion.config import CONF

_GROUPS = "$APP_CONFIG_GROUPS"


def text() -> str:
    """The template of conf/hydra/help, with the groups of conf/ and their options."""
    template = yaml.safe_load((CONF / "hydra" / "help" / "train.yaml").read_text(encoding="utf-8"))["template"]
    folders = sorted(path for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")
    options = {folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in folders}
    return template.replace(_GROUPS, "".join(f"{name}: {', '.join(found)}\n" for name, found in options.items()))
