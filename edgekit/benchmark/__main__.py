"""The child process of a benchmark: `python -m edgekit.benchmark REQUEST`."""

import sys

from edgekit.benchmark._apart import work

work(sys.argv[1])
