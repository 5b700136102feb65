"""XLA's flags of the tests: simulated devices, and programs compiled at a fraction of the cost."""

from importlib.metadata import version

# Tests compile far more than they compute. Values agree either way within all tolerances; what a
# test starts as a user does runs what users run.
QUICK_COMPILE = "--xla_backend_optimization_level=0"
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    # A third of the time again; later versions know no such flag, and XLA refuses unknown ones.
    QUICK_COMPILE += " --xla_cpu_use_fusion_emitters=false"


def xla_flags(devices: int = 1) -> str:
    """``XLA_FLAGS`` of a process with so many CPU devices."""
    return f"--xla_force_host_platform_device_count={devices} {QUICK_COMPILE}"
