"""Read and check `config.yaml`. Imports no torch.

`load` returns a frozen `Config` whose attributes are the YAML names; `schema.py` describes each of them.
"""

from __future__ import annotations

from utils.config.lengths import differences, flat, from_dict, resolve_lengths, to_dict, with_defaults
from utils.config.loader import config_file, load
from utils.config.paths import check_files, class_names_file
from utils.config.schema import Config

__all__ = [
    "Config",
    "check_files",
    "class_names_file",
    "config_file",
    "differences",
    "flat",
    "from_dict",
    "load",
    "resolve_lengths",
    "to_dict",
    "with_defaults",
]
