"""Test the settings of rollout servers, and the arguments of the program that starts one."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from train_runs import environment

from rmsd_fast.config import SettingsError
from rmsd_fast.setting_rules.training import check_together
from rmsd_fast.settings import load_settings


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            ["rollout.engine=vllm_server"],
            "rollout.server_urls: expected one or more URLs with rollout.engine=vllm_server",
        ),
        (
            ["rollout.server_urls=[http://h:1]"],
            r"rollout.engine: expected vllm_server with rollout.server_urls=\['http",
        ),
        (["rollout.engine=vllm", "rollout.server_urls=[http://h:1]"], "rollout.engine: expected vllm_server with"),
        *(
            (["rollout.engine=vllm_server", f"rollout.server_urls=['{url}']"], "expected http://<host>:<port>, got")
            for url in (
                "h:1",
                "http://h",
                "https://h:1",
                "http://h:0",
                "http://h:99999",
                "http://h:1/v1",
                "http://u@h:1",
                "",
            )
        ),
        (["rollout.engine=vllm_server", "rollout.server_urls=[http://h:1,http://h:1]"], "expected different servers"),
    ],
)
def test_settings(settings, expected):
    with pytest.raises(SettingsError, match=expected):
        load_settings("quickstart", settings)


def test_settings_that_fit_or_not():
    both = ["rollout.engine=vllm_server", "rollout.server_urls=[http://h:1,'http://[::1]:2']"]
    assert load_settings("quickstart", [*both, "rollout.vllm_kv_cache_gib=3"]).rollout.vllm_kv_cache_gib == 3
    with pytest.raises(SettingsError, match="expected hf with model.quantize.*got vllm_server with model.quantize=nf4"):
        check_together(load_settings("quickstart", [*both, "model.adapter=lora", "model.quantize=nf4"]))
    with pytest.raises(SettingsError, match="rollout.server_urls has no effect: no stage samples rollouts"):
        load_settings("quickstart", ["stages=[sft]", "rollout.server_urls=[http://h:1]"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--host", "0.0.0.0"], "rmsd_fast.serve_rollouts: --host: expected 127.0.0.1 without a token, since anybody"),
        (["--host", ""], "argument --host: expected an address of this machine, got ''"),
        (["--sequences", "0"], "argument --sequences: expected a number of at least 1, got '0'"),
        (
            ["made.enabled=false"],
            "engine=vllm_server: expected the package vllm, got none|model.path: expected a path, got nothing",
        ),
        (["--port", "70000"], "expected a port from 1 to 65535, got '70000'"),
    ],
)
def test_the_program_says_what_is_wrong(arguments, expected):
    done = subprocess.run(
        [sys.executable, "-m", "rmsd_fast.serve_rollouts", "quickstart", *arguments],
        env={**environment(), "RMSD_ROLLOUT_TOKEN": ""},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2 and re.search(expected, done.stderr) and "Traceback" not in done.stderr, done.stderr
