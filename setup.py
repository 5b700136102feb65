"""What pyproject.toml cannot say: recipes and tools lie in the wheel; extras as in requirements."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def lines(name: str) -> list[str]:
    """The requirements of a file, without its comments."""
    text = (HERE / f"{name}.txt").read_text("utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def jax_with(extra: str) -> list[str]:
    """The jax of requirements.txt, with an extra of its own."""
    found = [line for line in lines("requirements") if line.startswith("jax>")]
    return [line.replace("jax", f"jax[{extra}]", 1) for line in found]


# configs/ and tools/ keep their names for imports: srpo_jax.launch finds srpo_jax/checkout/.
places = {
    f"srpo_jax.checkout.{name}": name.replace(".", "/")
    for name in find_packages(str(HERE), include=["configs", "tools", "tools.*"])
}
setup(
    packages=[*find_packages(str(HERE), include=["srpo_jax", "srpo_jax.*"]), *places],
    package_dir=places,
    install_requires=lines("requirements"),
    extras_require={
        "gpu": jax_with("cuda13"),
        "tpu": jax_with("tpu"),
        "plan": [*lines("requirements-aot"), *lines("requirements-aot-nodeps")],
        "test": lines("requirements-test"),
        "docs": lines("requirements-docs"),
        "wandb": ["wandb>=0.19"],
        "mlflow": ["mlflow-skinny>=3"],
    },
)
