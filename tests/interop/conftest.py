import pytest

from jpeft_interop.packaged import minilm_folder as find_minilm
from jpeft_interop.packaged import smollm2_folder as find_smollm2


@pytest.fixture(scope="session")
def smollm2_folder():
    """SmolLM2-135M-Instruct in fp32, converted at the first use on this machine."""
    return find_smollm2()


@pytest.fixture(scope="session")
def minilm_folder():
    """all-MiniLM-L6-v2 in fp32."""
    return find_minilm()
