import pytest

from written_out import RELEASES, modules


@pytest.fixture(params=RELEASES)
def sj(request):
    """The modules of a release of SpikingJelly, one after the other."""
    return modules(request.param)
