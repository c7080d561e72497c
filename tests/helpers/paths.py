"""The repository's folders, and the data that may lie beside the checkout."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
SHARED = next((path for path in (ROOT / "shared", ROOT.parent / "shared") if path.is_dir()), ROOT.parent / "shared")
GEOMETRY = SHARED / "real" / "geometry3k"
GOLDEN = SHARED / "golden" / "released_rewards.jsonl"
