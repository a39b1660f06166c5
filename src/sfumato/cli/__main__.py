"""`python -m sfumato.cli` is `sfumato`."""

import sys

from sfumato.cli import main

sys.exit(main())
