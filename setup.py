"""One step that pyproject.toml cannot say: `configs/` of the checkout is installed as `palimpsest/configs/`."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CONFIGS = Path("configs")


class BuildWithConfigs(build_py):
    """Build the packages, and the configs that are shipped into one of them; an editable install reads them where they are."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for file, target in self._copies().items():
                self.mkpath(str(target.parent))
                self.copy_file(str(file), str(target))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        copies = [] if self.editable_mode else [str(target) for target in self._copies().values()]
        return [*super().get_outputs(include_bytecode), *copies]

    def _copies(self) -> dict[Path, Path]:
        """What is copied, and where to."""
        return {file: Path(self.build_lib, "palimpsest", file) for file in sorted(CONFIGS.rglob("*")) if file.is_file()}


setup(cmdclass={"build_py": BuildWithConfigs})
