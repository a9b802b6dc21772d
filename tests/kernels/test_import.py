import subprocess
import sys


def test_importing_the_package_does_not_import_triton() -> None:
    code = (
        "import sys, lora_kernels, lora_kernels.nf4, lora_kernels.segments, lora_kernels.sgmv, "
        "lora_kernels.kv_store, lora_kernels.attention; sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
