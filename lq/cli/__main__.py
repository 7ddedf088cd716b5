"""``python -m lq.cli``: the command, where scripts of packages are not on the path."""

import sys

from lq.cli.command import main

sys.exit(main())
