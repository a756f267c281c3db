"""`python -m hedgespec`: the command line, where its script is not on the path."""

import sys

from hedgespec.cli import main

sys.exit(main())
