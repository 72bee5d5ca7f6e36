"""URLs with a password and a signature through every command: no file and no line holds either."""

import base64
import functools
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.errors import raises
from support.models import embed_config
from support.pages import Notes
from support.processes import tiny_config
from support.shards import MakeShards

import maekit
from maekit.checking import check_shards
from maekit.config import load_config
from maekit.config.evaluate import EvaluateConfig
from maekit.config.pages import ReportConfig
from maekit.shards import download
from maekit.shards.cache import RemoteCache
from maekit.shards.spec import find_shards
from maekit.system.errors import InputError, MaekitError

PASSWORD, SIGNATURES = "s3cr3tPassword", ("s3cr3tMonday", "s3cr3tTuesday")


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves who has the password and a signature; another name is redirected to, and refused with both in it."""

    def log_message(self, *arguments: Any) -> None:
        pass

    def send_head(self) -> Any:
        password = base64.b64decode((self.headers["Authorization"] or " ").split(" ")[1]).decode()
        if password != f"bob:{PASSWORD}" or not any(f"X-Amz-Signature={s}" in self.path for s in SIGNATURES):
            return self.send_error(403, f"refused {self.path} of {password}".replace("\n", ""))
        return super().send_head()


@pytest.fixture
def signed(make_shards: MakeShards, tmp_path: Path, monkeypatch) -> Iterator[list[str]]:
    """Return the URL of the same shards as signed on two days, and one that is refused."""
    monkeypatch.setenv("MAEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "_LONGEST_PAUSE", 0.01)
    shards = str(make_shards(9, 4, 20))
    check_shards(find_shards(shards), write_indexes=True, crc=True)
    handler = functools.partial(_Handler, directory=shards)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://bob:{PASSWORD}@127.0.0.1:{server.server_port}/{{000..002}}.tar?X-Amz-Date=1&X-Amz-Signature="
    yield [url + signature for signature in (*SIGNATURES, "s3cr3tForged")]
    server.shutdown()
    server.server_close()


def holding_secrets(folder: Path) -> list[str]:
    return [
        str(path)
        for path in folder.rglob("*")
        if "s3cr3t" in str(path.relative_to(folder)) or (path.is_file() and b"s3cr3t" in path.read_bytes())
    ]


def test_training_and_what_follows(signed: list[str], trained: Path, tmp_path: Path) -> None:
    monday, tuesday, forged = signed
    run, notes = tmp_path / "run", Notes()
    config = tiny_config(Path("."), run, data__val_images=2)
    config.shards, config.data.val = (monday,), (monday,)
    maekit.pretrain(config, notes)
    assert "***@127.0.0.1" in (run / "config.toml").read_text()
    # Signed again, it is the same data; so it is beside the settings of an earlier version, which hid nothing.
    config.shards, config.data.val = (tuesday,), (tuesday,)
    assert maekit.pretrain(config, notes).already_finished
    hidden = (run / "config.toml").read_text()
    (run / "config.toml").write_text(
        hidden.replace("***@", f"bob:{PASSWORD}@").replace("***", monday.partition("?")[2])
    )
    assert maekit.pretrain(config, notes).already_finished
    (run / "config.toml").write_text(hidden)
    assert len(list((tmp_path / "cache" / "shards").glob("*/*.tar"))) == 3
    with raises(InputError, match="name the shards by the whole URL"):
        maekit.pretrain(load_config(run / "config.toml"), notes)

    result = maekit.embed(embed_config(trained, tmp_path / "out", shards=(tuesday,)), notes)
    assert (result.rows, result.errors) == (33, 0)
    assert maekit.embed(embed_config(trained, tmp_path / "out", shards=(monday,)), notes).skipped == 3
    maekit.report(ReportConfig(str(run)), notes)
    maekit.evaluate(EvaluateConfig("retrieval", str(run), (tuesday,), baselines=False), notes)
    for shards in (find_shards(forged), find_shards(forged.replace(PASSWORD, "s3cr3tGuess"))):
        with pytest.raises(MaekitError) as refused:
            RemoteCache().fetch(shards[0])
        notes.said.append(f"{refused.value!r} {refused.getrepr(style='native')}")
    (tmp_path / "notes").write_text("\n".join(notes.said))
    assert "left out: neighbours" in (tmp_path / "notes").read_text()
    assert holding_secrets(tmp_path) == []


def test_the_command_line(signed: list[str], trained: Path, tmp_path: Path) -> None:
    good, _, forged = signed
    model, out = str(trained / "encoder.onnx"), str(tmp_path / "out")
    for code, arguments in [
        (0, ["check", good, "--json"]),
        (1, ["check", forged, "--json"]),
        (1, ["embed", model, forged, "--out", out, "--device", "cpu", "--json"]),
        (1, ["embed", model, good.replace("http:", "nonsense:"), "--out", out, "--device", "cpu"]),
        (2, ["neighbours", out, "--query", "0", "--out", "x.html", "--shards", forged.replace("{000..002}.tar", "")]),
        (2, ["pretrain", good.replace(".tar?", ".tar::x?"), "--out", "run"]),
        (2, ["reconstruct", good, good]),
        (2, ["check", good, f"--{good}"]),
        (2, [good]),
    ]:
        ran = subprocess.run(
            [sys.executable, "-m", "maekit", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert ran.returncode == code, (arguments, ran.stderr)
        assert "s3cr3t" not in ran.stdout + ran.stderr
        if "--json" in arguments:
            json.loads(ran.stdout.splitlines()[-1])
    assert holding_secrets(tmp_path) == []


def test_the_name_of_a_shard_holds_no_password() -> None:
    hosts = [f"s3://KEY:{PASSWORD}@one/a.tar", f"https://{PASSWORD}@two/a.tar?sig={SIGNATURES[0]}", "s3://one/b.tar"]
    assert [shard.name for shard in find_shards(hosts)] == ["https:/two/a.tar", "s3:/one/a.tar", "s3:/one/b.tar"]
    again = find_shards([hosts[1], hosts[1].replace(*SIGNATURES)])
    assert len(again) == 1
    with raises(InputError, match="both be named a.tar"):
        find_shards(["https://host/a.tar?id=1", "https://host/a.tar?id=2"])
