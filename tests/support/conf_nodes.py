"""Objects from the YAML files of conf/, so that a new file is tested the moment it exists."""

from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from ldm.config.schema import register

CONF = Path(__file__).parents[2] / "conf"
EXPERIMENTS = sorted(p.stem for p in (CONF / "experiment").glob("*.yaml"))


def options(group: str) -> list[str]:
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


def build(group: str, option: str, **overrides: Any) -> Any:
    node = OmegaConf.load(CONF / group / f"{option}.yaml")
    return instantiate(OmegaConf.merge(node, overrides))


def composed(*overrides):
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))
