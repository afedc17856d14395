"""Published files: where they are taken from, and that their checksums are compared."""

import hashlib

import pooch
import pytest

from probdiff.datasets.files import fetch, given

CHECKSUMS = {"a": hashlib.sha256(b"abc").hexdigest()}
URL = "https://example.invalid/"


@pytest.mark.parametrize(
    "take", [lambda name: fetch(name, CHECKSUMS, URL), lambda name: given(name, CHECKSUMS)]
)
def test_altered_file_is_refused_by_name(monkeypatch, tmp_path, take):
    (tmp_path / "a").write_bytes(b"something else")
    monkeypatch.setenv("PROBDIFF_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=rf"a must have the SHA-256 {CHECKSUMS['a']}"):
        take("a")


def test_file_with_the_right_checksum_is_taken_from_the_folder(monkeypatch, tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    monkeypatch.setenv("PROBDIFF_DATA", str(tmp_path))
    assert fetch("a", CHECKSUMS, URL) == tmp_path / "a"


@pytest.mark.parametrize("folder", [None, "empty"])
def test_file_that_is_not_given_is_downloaded_under_its_checksum(monkeypatch, tmp_path, folder):
    asked = []

    def retrieve(url, known_hash, fname, progressbar):
        asked.append((url, known_hash, fname))
        return str(tmp_path / fname)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    if folder is None:
        monkeypatch.delenv("PROBDIFF_DATA", raising=False)
    else:
        monkeypatch.setenv("PROBDIFF_DATA", str(tmp_path / folder))
    assert given("a", CHECKSUMS) is None
    assert fetch("a", CHECKSUMS, URL) == tmp_path / "a"
    assert asked == [(URL + "a", CHECKSUMS["a"], "a")]
