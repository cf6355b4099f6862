import sys
from pathlib import Path

# benchmarks/ is no part of the installed package. Appended: an installed fastlora stays the one under test.
sys.path.append(str(Path(__file__).resolve().parents[2]))
