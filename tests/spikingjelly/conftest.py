import pytest

from written_out import RELEASES, modules

OLDEST, *LATER = RELEASES


@pytest.fixture(params=[pytest.param(OLDEST, marks=pytest.mark.slow), *LATER])
def sj(request):
    """The modules of a release of SpikingJelly, one after the other."""
    return modules(request.param)
