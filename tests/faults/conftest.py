"""What the tests of crashes, full disks and signals share."""

import pytest
from stages import make_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """The inputs of the stages."""
    return make_inputs(tmp_path_factory.mktemp("inputs"))
