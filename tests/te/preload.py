"""What the ranks of these tests import, once: Transformer Engine over the stand-in, then what ranks of tests/dist do."""

from tests.te import stand_in

stand_in.install()

import tests.dist.preload  # noqa: E402, F401
