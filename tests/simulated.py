"""XLA's flags of the tests: simulated devices, and programs compiled at half the cost."""

# Tests compile far more than they compute. Values agree at either level within all tolerances;
# what a test starts as a user does runs what users run.
QUICK_COMPILE = "--xla_backend_optimization_level=0"


def xla_flags(devices: int = 1) -> str:
    """``XLA_FLAGS`` of a process with so many CPU devices."""
    return f"--xla_force_host_platform_device_count={devices} {QUICK_COMPILE}"
