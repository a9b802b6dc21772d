import subprocess
import sys


def test_importing_the_package_does_not_import_triton() -> None:
    code = (
        "import sys; from lora_kernels import activation, attention, nf4, norm, rotary, segments, sgmv, vectors; "
        "sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
