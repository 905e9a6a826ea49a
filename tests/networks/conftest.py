"""Shows what was compared where an assertion of the shared tests fails."""

import pytest

pytest.register_assert_rewrite("networks.base")
