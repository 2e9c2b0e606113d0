"""One name for one thing: a name that was replaced does not come back, and no two classes have the same one."""

from __future__ import annotations

import ast
import collections
import re

import pytest

from tests import git
from tests.conftest import ROOT
from tests.house.test_local_names import names

# Where old names are the subject: the table of them and its tests, what changed and why, and files of earlier versions.
ABOUT_OLD_NAMES = (
    "utils/renamed.py", "tests/utils/test_renamed.py", "tests/test_old_state.py", "tests/house/test_names.py",
    "tests/data/", "CHANGELOG.md", "docs/decisions.md",
)  # fmt: skip

# Identifiers, and what replaced them.
IDENTIFIERS = {
    "prec1": "top1", "prec5": "top5", "best_prec1": "best_metric", "LostRank": "RankLostError",
    "facts": "metadata", "Facts": "VideoMetadata", "FactsCache": "MetadataCache", "KnownFacts": "KnownMetadata",
    "facts_cache": "metadata_cache", "witness": "probe_file", "frame_shard": "frame_pack", "FrameShard": "FramePack",
    "Desk": "ReadHandler", "data_desk": "reader_stages", "_bury": "_on_exit", "_rescue": "_resubmit_lost",
    "_look_at": "_check", "Cut": "CropViews", "cut_views": "crop_views", "Chunks": "ViewBatcher",
    "Pace": "StragglerMonitor", "standing_out": "find_stragglers", "Statistics": "BnStats",
    "Cell": "Trial", "Earlier": "ResumedParts", "Sign": "Heartbeat", "Reading": "LoaderOptions",
    "ROOMS": "PACKAGES", "room_of": "package_of",
}  # fmt: skip
MEMBERS = {"statistics": "bn_stats", "several": "multi_label", "using": "rng_scope"}  # of our objects and modules
MODULES = {"utils.faults": "utils.errors", "utils.pace": "utils.stragglers", "utils.chunks": "utils.view_batches"}

# Values of configs and files, in any text.
VALUES = re.compile(
    r"(?<![\w.-])(mm[01]|pysf|seed004|three_mm|(?:centre|three)_psf|prec[15]|best_prec1|acc[15]_(?:train|val)"
    r"|data\.facts|facts\.bin)(?!\w)"
)
# Tests compare with tables whose columns are named after other tools, and with weights files of other tools.
VALUES_OF_THE_PRODUCT = re.compile(r"(?<![\w.-])(mma|psf)(?!\w)")
IN_THE_LOG = re.compile(r"Prec@[15]")  # the titles in log.txt, which users parse
FOREIGN = {"tests/methods/test_interop.py": {"best_prec1"}}  # keys of another tool's checkpoints


def files(*suffixes: str) -> list[str]:
    return [name for name in git.files() if name.endswith(suffixes) and not name.startswith(ABOUT_OLD_NAMES)]


def old_names(code: str) -> list[str]:
    """Return `line: old name -> new name` of the old names in Python code."""
    tree = ast.parse(code)
    uses = [(line, name, IDENTIFIERS[name]) for line, name in names(tree) if name in IDENTIFIERS]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in MEMBERS:
            uses.append((node.lineno, node.attr, MEMBERS[node.attr]))
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", "")
            paths = [alias.name if not module else f"{module}.{alias.name}" for alias in node.names]
            uses += [(node.lineno, path, MODULES[path]) for path in {*paths, module} if path in MODULES]
    return [f"{line}: {old} -> {new}" for line, old, new in uses]


def test_no_old_identifier_is_left() -> None:
    left = [f"{name}:{use}" for name in files(".py") for use in old_names((ROOT / name).read_text(encoding="utf-8"))]
    assert not left, "\n".join(left)


def test_no_old_value_is_left() -> None:
    left = []
    for name in files(".py", ".md", ".yaml", ".yml", ".json", ".js", ".sh", ".ipynb"):
        text = (ROOT / name).read_text(encoding="utf-8")
        is_test = name.startswith("tests/")
        for number, line in enumerate(text.splitlines(), 1):
            values = VALUES.findall(line) + ([] if is_test else VALUES_OF_THE_PRODUCT.findall(line))
            if not is_test and "log.txt" not in line:
                values += IN_THE_LOG.findall(line)
            left += [f"{name}:{number}: {value}" for value in values if value not in FOREIGN.get(name, ())]
    assert not left, "\n".join(left)


@pytest.mark.parametrize(
    "code", ["from utils import faults", "import utils.faults", "from utils.faults import UserError", "x.statistics",
             "def run(facts): ...", "class Desk: ...", "f'{prec1:.2f}'"],
)  # fmt: skip
def test_old_names_are_seen(code: str) -> None:
    assert old_names(code)


def test_the_standard_library_and_new_names_are_allowed() -> None:
    assert not old_names("import statistics\nstatistics.fmean(metadata)\nfrom tests import faults\nself.bn_stats")


def test_no_two_classes_have_the_same_name() -> None:
    places = collections.defaultdict(list)
    for name in (name for name in git.files() if name.endswith(".py") and not name.startswith("tests/")):
        for node in ast.parse((ROOT / name).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(name)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}
