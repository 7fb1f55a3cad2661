"""Lets the plugin's tests run from a checkout of lrcompile, where the plugin is not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
