"""The code in docs/runs.md runs as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from agents import Run
from tests.test_readme import BLOCK, ROOT

PAGE = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
SHORT = "timesteps=128, num_envs=4, n_steps=16, batch_size=32, warm_start=0, eval_examples=4"


def test_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = "".join(match["code"] for match in BLOCK.finditer(PAGE) if not match["info"])
    for long, short in (
        ("timesteps=131_072", f"{SHORT}, device='cpu', max_new_tokens=8"),
        ("progress=True", "progress=False"),
        ("max_examples=100", "max_examples=4, device='cpu'"),
    ):
        assert code.count(long) == 1
        code = code.replace(long, short)
    names: dict[str, object] = {}
    exec(compile(code, "runs.md", "exec"), names)
    assert "nats, advantage" in capsys.readouterr().out
    run = names["run"]
    assert isinstance(run, Run) and run.is_finished
    # The table of files names all that there are.
    for path in run.folder.iterdir():
        name = "events.out.tfevents.*" if path.name.startswith("events") else path.name
        assert f"`{name}`" in PAGE or f"`{name}/`" in PAGE, name
    # So do those of the fields of a trace.
    for record in run.traces():
        for field in {*record, *record["turns"][0]}:
            assert f"`{field}`" in PAGE, field
