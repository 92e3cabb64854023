import pytest

from written_out import RELEASES, modules

OLDEST, EARLIER, INSTALLED = RELEASES


# The installed one comes first: of a test that runs for one release alone, `make test` runs that.
@pytest.fixture(params=[INSTALLED, EARLIER, pytest.param(OLDEST, marks=pytest.mark.slow)])
def sj(request):
    """The modules of a release of SpikingJelly, one after the other."""
    return modules(request.param)
