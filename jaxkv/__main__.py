"""`python -m jaxkv` is the command `jaxkv`."""

from __future__ import annotations

import sys

from jaxkv.cli import main

sys.exit(main())
