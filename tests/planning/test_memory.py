"""The memory that is planned for a CPU is that of a real run."""

from pathlib import Path

HERE = Path(__file__).parent
