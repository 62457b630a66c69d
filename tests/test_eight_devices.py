"""The tests that need eight devices, in a process of their own: how many there are is settled when JAX starts.

`pytest tests/eight_devices` runs them alone. All others have one device, on which they take a fifth less time.
"""

import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "eight_devices"


def test_on_eight_devices(request):
    marks = ["-m", request.config.option.markexpr]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *marks, str(FOLDER)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    print(result.stdout)  # The report of what failed; shown only then.
    assert result.returncode == 0, result.stderr
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 30
