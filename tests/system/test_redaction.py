"""What is hidden of a URL, and what it names."""

import json
import pickle
import time

import pytest

from maekit.system.errors import DamagedShard, ImageError, InputError
from maekit.system.redaction import HIDDEN, address, identity, is_redacted, redact, redacted

AZURE = "sv=2024-11-04&st=2026-11-01&se=2026-12-01&sr=b&sp=r&spr=https&sig=s3cr3t%2Bx%3D"
AMAZON = "X-Amz-Algorithm=AWS4&X-Amz-Credential=AKIA%2Fs3cr3t&X-Amz-Date=2026&X-Amz-Expires=9&X-Amz-Signature=s3cr3t"


@pytest.mark.parametrize(
    ("url", "shown", "named"),
    [
        ("https://host/x.tar", None, None),
        ("http://[::1]:8000/a@b.tar", None, None),
        ("https://host:8080/a@2x.tar", None, None),
        ("s3://arn:aws:s3:us-west-2:1:accesspoint/n/k@2x.tar", None, None),
        ("abfs://container@account.dfs.core.windows.net/x.tar", None, None),
        ("github://owner:repository@main/x.tar", None, None),
        ("hf://datasets/owner/name@revision/x.tar", None, None),
        ("sftp://bob@host/x.tar", None, None),
        ("a?sig=s3cr3t.tar", "a?sig=***", None),
        ("https://bob:s3cr3t@host/x.tar", "https://***@host/x.tar", "https://bob@host/x.tar"),
        ("https://s3cr3t@host/x.tar", "https://***@host/x.tar", "https://host/x.tar"),
        ("ftp://bob:s3cr3t@p@ss@host/x.tar", "ftp://***@host/x.tar", "ftp://bob@host/x.tar"),
        ("https://bob:s3cr3t?#w@host/x.tar", "https://***@host/x.tar", "https://bob@host/x.tar"),
        ("s3://AKIA:s3c/r3t+x@bucket/x.tar", "s3://***@bucket/x.tar", "s3://AKIA@bucket/x.tar"),
        (f"https://host/x.tar?{AMAZON}", "https://host/x.tar?***", "https://host/x.tar"),
        (f"https://host/x.tar?versionId=7&{AMAZON}", "https://host/x.tar?***", "https://host/x.tar?versionId=7"),
        (f"https://host/x.tar?{AZURE}&snapshot=7", "https://host/x.tar?***", "https://host/x.tar?snapshot=7"),
        ("https://host/x.tar?Expires=1&Signature=s3cr3t&Key-Pair-Id=K", "https://host/x.tar?***", "https://host/x.tar"),
        ("https://host/get.tar?id=3&access_token=s3cr3t", "https://host/get.tar?***", "https://host/get.tar?id=3"),
        ("https://host/get.tar?st=north&id=3", "https://host/get.tar?***", "https://host/get.tar?st=north&id=3"),
        ("memory://bob:s3cr3t@bucket/x.tar?token=s3cr3t", "memory://***@bucket/x.tar?***", "memory://bob@bucket/x.tar"),
    ],
)
def test_urls(url: str, shown: str | None, named: str | None) -> None:
    assert redact(url) == (shown or url) == redact(redact(url))
    assert identity(url) == (named or url)
    if "://" in url:
        assert is_redacted(redact(url)) == (shown is not None)
        assert address(url) == (shown or url).replace("***@", "").replace("?***", "")
    assert "s3c" not in redact(url)


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("https://host/x.tar?a=s3cr3t: no such file", "https://host/x.tar?***: no such file"),
        ("403, url=URL('https://host/x?sig=s3cr3t')", "403, url=URL('https://host/x?***')"),
        ("(s3://a:s3cr3t@b/c.tar), https://d?e=s3cr3t, f", "(s3://***@b/c.tar), https://d?***, f"),
        ("GET /x.tar?X-Amz-Signature=s3cr3t&part=1 failed", "GET /x.tar?X-Amz-Signature=***&part=1 failed"),
        ("is https://host/x.tar there? yes: `a=1`, b@c", "is https://host/x.tar there? yes: `a=1`, b@c"),
    ],
)
def test_sentences(said: str, shown: str) -> None:
    assert redact(said) == shown


def test_what_a_library_says_of_a_url_it_took_apart() -> None:
    url = "s3://AKIA:s3cr3t%2Bword@bucket/x.tar?session=s3cr3t%20too"
    for said in ("bucket 'AKIA:s3cr3t%2Bword@bucket'", "password s3cr3t+word refused", "session s3cr3t too old"):
        assert "s3cr3t" not in redact(said, url)
        assert HIDDEN in redact(said, url)


def test_no_error_holds_a_secret() -> None:
    url = "https://bob:s3cr3t@host/x.tar?sig=s3cr3t"
    for error in (InputError(f"{url}: x"), DamagedShard(url, 5, f"{url} is cut"), ImageError("empty", url)):
        for held in (error, pickle.loads(pickle.dumps(error))):
            assert "s3cr3t" not in repr(held) + str(vars(held))
            assert "https://***@host/x.tar?***" in str(held)


@pytest.mark.parametrize("piece", ["a", "://", "a://b:c/", "?a=", "a:", "https://a?:", "&_-", "://?&sig="])
def test_no_text_takes_long(piece: str) -> None:
    text = f"a://b {piece * (300_000 // len(piece))}"
    before = time.process_time()
    redact(text, text[:200])
    assert time.process_time() - before < 2


def test_values_keep_their_types() -> None:
    url = "https://s3cr3t@host/x.tar"
    value = {"shards": (url, "local/*.tar"), "list": [url, 1, None, 0.5], url: True}
    assert "s3cr3t" not in json.dumps(redacted(value))
    assert redacted(value)["shards"] == ("https://***@host/x.tar", "local/*.tar")
    assert redacted(value)["list"][1:] == [1, None, 0.5]
