"""The package itself: each command is a function of its name that takes the config of its name, at every use."""

import dataclasses
import inspect
import pkgutil
from importlib import import_module

import pytest
import typer

import maekit
from maekit.cli.app import app
from maekit.config.fields import settings_of

COMMANDS = sorted({*typer.main.get_command(app).commands, "finetune"} - {"demo", "probe"})


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_a_function_and_a_config_at_every_use(name: str) -> None:
    """Importing a module named as the function would put the module in its place at the second use."""
    config = getattr(maekit, f"{name.capitalize()}Config")
    for _ in "12":
        function = getattr(maekit, name)
        assert inspect.isfunction(function)
        import_module(function.__module__)
    first, *rest = inspect.signature(function, eval_str=True).parameters.values()
    assert first.name == "config"
    assert config.__name__ in str(first.annotation)
    assert [parameter.name for parameter in rest] in ([], ["progress"])


def test_no_module_at_the_root_bears_the_name_of_a_function() -> None:
    modules = {module.name for module in pkgutil.iter_modules(maekit.__path__)}
    assert not modules & {name for name in maekit.__all__ if inspect.isfunction(getattr(maekit, name))}


def test_everything_public_is_there_and_described() -> None:
    for name in maekit.__all__:
        thing = getattr(maekit, name)
        assert name in dir(maekit)
        assert name == "__version__" or (thing.__doc__ or "").strip(), name


@pytest.mark.parametrize("name", [name for name in maekit.__all__ if name.endswith("Config")])
def test_every_setting_says_what_it_is(name: str) -> None:
    """In the docstring of its class as well; paths may be given as such, and lists for tuples."""
    config = getattr(maekit, name)
    for key, _, about, _ in settings_of(config):
        assert about.help, key
    for field in dataclasses.fields(config):
        assert not field.metadata["setting"].help or f"{field.name}: " in config.__doc__


def test_a_name_that_is_none() -> None:
    with pytest.raises(AttributeError, match="no attribute 'embedd'"):
        _ = maekit.embedd
