import contextlib
import io

import pytest
from absl.testing import flagsaver
from command_lines import TINY

from ortho_keras.trainer import command
from tuning import search

SEARCH = ("--recipe=digits", *TINY, "--epochs=1", "--tuner=random", "--narrow=learning_rate=0.003:0.3")


@pytest.fixture(scope="session")
def search_of_two(tmp_path_factory):
    """A whole search of two trials in this process: its flags, its directory and what it printed."""
    directory, out = tmp_path_factory.mktemp("search") / "search", io.StringIO()
    with flagsaver.flagsaver(), contextlib.redirect_stdout(out):
        command.parse_flags(["tuning.search", *SEARCH, "--max_trials=2", f"--workdir={directory}"])
        assert search.main(None) == 0
    return SEARCH, directory, out.getvalue()
