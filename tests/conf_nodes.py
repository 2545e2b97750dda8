"""Objects from the YAML files of conf/, so that a new file is tested the moment it exists."""

from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import OmegaConf

CONF = Path(__file__).parent.parent / "conf"


def options(group: str) -> list[str]:
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


def build(group: str, option: str, **overrides: Any) -> Any:
    node = OmegaConf.load(CONF / group / f"{option}.yaml")
    return instantiate(OmegaConf.merge(node, overrides))
