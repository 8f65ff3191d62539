"""Runs the benchmark of HTTP calls, `fan_out.py`: `python benchmarks/http.py`.

Python puts this folder before the standard library, so whoever imports `http` finds this file first: it makes way.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

if __name__ == "__main__":
    from fan_out import main

    main()
else:
    here = Path(__file__).parent
    spec = PathFinder.find_spec(__name__, [path for path in sys.path if Path(path).resolve() != here.resolve()])
    sys.modules[__name__] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
