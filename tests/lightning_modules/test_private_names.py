"""Private names of Lightning and DeepSpeed that this project leans on are where they were when they were read."""

import ast
import inspect
from importlib import import_module
from importlib.metadata import version

import pytest

from tests.conftest import ROOT

# Where the name is used -> in which module it stands, in which class (or "" for the module), as read in which version.
NAMES = {
    "cli.py": [
        ("lightning.pytorch.cli", "LightningCLI", "_run_subcommand", "lightning 2.6.6"),
        ("lightning.pytorch.cli", "LightningCLI", "_parse_ckpt_path", "lightning 2.6.6"),
        (
            "lightning.pytorch.strategies.launchers.subprocess_script",
            "_SubprocessScriptLauncher",
            "procs",
            "lightning 2.6.6",
        ),
    ],
    "lightning_modules/running/strategies.py": [
        ("lightning.pytorch.strategies", "DDPStrategy", "_ddp_kwargs", "lightning 2.6.6"),
        ("lightning.pytorch.strategies", "DeepSpeedStrategy", "_precision_plugin", "lightning 2.6.6"),
        ("lightning.pytorch.strategies", "DeepSpeedStrategy", "_format_config", "lightning 2.6.6"),
        (
            "lightning.pytorch.strategies",
            "DeepSpeedStrategy",
            "_format_batch_size_and_grad_accum_config",
            "lightning 2.6.6",
        ),
        ("lightning.pytorch.strategies", "ModelParallelStrategy", "_data_parallel_size", "lightning 2.6.6"),
    ],
    "lightning_modules/running/borrowing.py": [
        ("deepspeed.runtime.zero.stage3", "", "fp32_partitioned_groups_flat", "deepspeed 0.19.8"),
        ("deepspeed.runtime.zero.stage3", "", "_partition_all_parameters", "deepspeed 0.19.8"),
        ("deepspeed.runtime.zero.stage3", "", "_reassign_or_swap_out_partitioned_parameters", "deepspeed 0.19.8"),
        ("deepspeed.runtime.zero.stage3", "", "persistent_parameters", "deepspeed 0.19.8"),
        ("deepspeed.runtime.zero.stage_1_and_2", "", "single_partition_of_fp32_groups", "deepspeed 0.19.8"),
        ("deepspeed.runtime.zero.stage_1_and_2", "", "update_lp_params", "deepspeed 0.19.8"),
    ],
    "lightning_modules/running/sharding.py": [
        ("deepspeed.runtime.zero.partition_parameters", "", "shutdown_init_context", "deepspeed 0.19.8"),
        ("deepspeed.runtime.zero.partition_parameters", "", "restore_init_context", "deepspeed 0.19.8"),
    ],
}
CASES = [(file, *name) for file, names in NAMES.items() for name in names]


def source(module: str, owner: str) -> str:
    """Of a module, or of a class with those that it inherits from."""
    found = import_module(module)
    if not owner:
        return inspect.getsource(found)
    bases = [one for one in getattr(found, owner).__mro__ if one.__module__.startswith("lightning")]
    return "\n".join(inspect.getsource(one) for one in bases)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("file", "module", "owner", "name", "read"), CASES, ids=[case[3] for case in CASES])
def test_a_private_name_is_still_there(file, module, owner, name, read):
    if module.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    package = read.partition(" ")[0]
    assert name in source(module, owner), (
        f"{package} {version(package)} has no {name} in {module} {owner} any more (there in {read}): "
        f"read what took its place, and mend {file}"
    )
    assert name in (ROOT / file).read_text(encoding="utf-8"), f"{file} does not use {name}: take it off this list"


def test_every_private_name_that_is_overridden_is_listed():
    """A method whose name starts with an underscore, in a subclass of Lightning's, is theirs unless we call it."""
    listed = {name for _, _, _, name, _ in CASES}
    for file, owner in (("cli.py", "CommandLine"), ("lightning_modules/running/strategies.py", "DeepSpeed")):
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        (found,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == owner]
        private = {one.name for one in found.body if isinstance(one, ast.FunctionDef) and one.name.startswith("_")}
        assert private - {"__init__"} <= listed, file
