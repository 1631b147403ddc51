import pytest
from emulated import DESCRIPTORS, HERE, compile_cpp, load


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("simt") / "plain.so"
    return load(compile_cpp(HERE / "library.cpp", path, "-O2", "-shared", "-fPIC", *DESCRIPTORS))


@pytest.fixture(scope="session")
def watched(tmp_path_factory):
    """The same with every access to shared memory watched: see csrc/simt/hooks.h."""
    folder = tmp_path_factory.mktemp("simt")
    (folder / "races.cpp").write_text('#include "simt/hooks.h"')
    flags = ["-O2", "-c", "-fPIC", "-fsanitize=thread", "-fno-tree-sra"]   # as _simt has them
    kernels = compile_cpp(HERE / "library.cpp", folder / "kernels.o", *flags)
    return load(compile_cpp(folder / "races.cpp", folder / "watched.so", "-O2", "-shared", "-fPIC", kernels))


@pytest.fixture(params=["plain", "watched"])
def lib(request):
    return request.getfixturevalue(request.param)
