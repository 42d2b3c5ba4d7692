"""``python -m tests.soak -o soak.json``."""

import sys

from tests.soak.soak import main

sys.exit(main())
