import json
import os
from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return tiny.write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def reference(world, tmp_path_factory):
    """Loss and gradients of the world's rows, one by one."""
    rows = [json.loads(line) for line in (world / "rows.jsonl").read_text().splitlines()]
    return tiny.Reference(world, tiny.lora_model(world), tmp_path_factory.mktemp("adapter")).loss_and_gradients(rows)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """The memory of checked images goes into a folder of its own; other processes find the product and the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        here = Path(__file__).parent
        patch.setenv("PYTHONPATH", os.pathsep.join([str(here.parent), str(here)]))
        yield
