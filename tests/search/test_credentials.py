from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizer.errors import ConfigError, StorageError
from optimizer.search import Search
from optimizer.search import storage as storages
from optimizer.search.credentials import VARIABLE, clean, clean_argument, hidden, masked, whole
from optimizer.store import write_atomically

SECRET = "hunter2secret"
FORMS = [
    "postgresql://bob:{}@host/db",
    "postgresql+psycopg://bob:{}@host:5432/db?sslmode=require",
    "mysql+pymysql://bob:{}@[::1]:3306/db",
    "postgresql://bob:{}/x@host/db",
    "postgresql://bob:a@{}@host/db",
    "postgresql://bob:{}?x@host/db",
    "postgresql://bob%3A{}@host/db",
    "postgresql://host/db?password={}",
    "postgresql://host/db?user=bob&password={}&x=1",
    "postgresql://host/db?user=bob&password=a&{}",
    "postgresql://host/db?p%61ssword={}",
    "postgresql://host/db?sslpassword={}",
    "postgresql:///?host=h;PWD={}",
    "mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BPWD%3D{}",
    "postgresql://host/db#password={}",
    "postgresql://host/db?password%3D{}",
    "postgresql://host/db?sslmode=require&authentication={}",
    "postgresql://host/db?host=h&{}",
    "postgresql://host/db?options=-c%20pwd%3D{}",
    "postgresql://bob;{}@host/db",
    "oracle://bob/{}@host/db",
    "postgresql://bob:{}",
    "postgresql://bob:{}/db",
    "host=h password={}",
    "bob:{}@host/db",
]


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")


@pytest.mark.parametrize("form", FORMS)
def test_no_form_of_an_address_shows_its_password(form: str) -> None:
    address = form.format(SECRET)
    assert SECRET not in masked(address)
    assert masked(masked(address)) == masked(address)
    assert Search(storage=address).storage == masked(address)
    assert SECRET not in repr(Search(storage=address))
    if "://" in address:
        assert whole(masked(address)) == address
    assert SECRET not in clean(f"said: '{address}'")


def test_a_message_that_holds_the_password_alone_is_cleaned() -> None:
    hidden("postgresql://bob:hunter2%20secret@host/db")
    assert clean("user bob, hunter2 secret; hunter2%20secret") == "user bob, ***; ***"


@given(st.text(min_size=4, max_size=20).filter(lambda text: "\n" not in text))
def test_any_password_that_is_quoted_for_addresses(password: str) -> None:
    address = f"postgresql://bob:{quote(password, safe='')}@host:5432/db"
    assert masked(address) == "postgresql://bob:***@host:5432/db"


@pytest.mark.parametrize(
    "address",
    ["sqlite:///study.db", "sqlite:////abs/a b:c.db", "postgresql://bob@host:5432/db?sslmode=x",
     "postgresql://[::1]:5432/db", "study.db", "postgresql:///db"],
)  # fmt: skip
def test_an_address_without_a_password_stays(address: str) -> None:
    assert masked(address) == address
    assert whole(address) == address


def test_a_mask_without_its_password_is_explained() -> None:
    with pytest.raises(ConfigError, match=VARIABLE):
        whole("postgresql://bob:***@host/db")


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ("search.storage=postgresql://b:{}@h/d", "search.storage=postgresql://b:***@h/d"),
        ("+search.storage='postgresql://b:{}@h/d'", "+search.storage='postgresql://b:***@h/d'"),
        (
            "search={{space:moves,storage:'postgresql://b:{}@h/d'}}",
            "search={{space:moves,storage:'postgresql://b:***@h/d'}}",
        ),
        (
            "search.storage=postgresql://b:{}@h/d,postgresql://b:{}@i/d",
            "search.storage=postgresql://b:***@h/d,postgresql://b:***@i/d",
        ),
        ("search.storage=${{oc.env:A}}", "search.storage=${{oc.env:A}}"),
        (
            "search.storage=postgresql://b:${{oc.env:A}}@h/d",
            "search.storage=postgresql://b:${{oc.env:A}}@h/d",
        ),
        ("data.path=s3://key:{}@bucket", "data.path=s3://key:{}@bucket"),
    ],
)
def test_words_of_the_command_line(given: str, left: str) -> None:
    assert clean_argument(given.format(SECRET, SECRET)) == left.format(SECRET)


def test_a_password_beside_an_interpolation_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"oc\.env"):
        clean_argument("search.storage=postgresql://${oc.env:USER}:" + SECRET + "@h/d")


@pytest.mark.parametrize(
    "form",
    ["postgresql://bob:{}@host:x/db", "postgresql://bob:{}/w@host:5432/db", "sqlite:///{}%zz\x00",
     "{}", "nothing://bob:{}@host/db", "postgresql://bob:{}@127.0.0.1:9/none"],
)  # fmt: skip
def test_an_address_that_will_not_do_is_explained_without_it(form: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, StorageError)) as caught:
        storages.open_storage(form.format(SECRET), tmp_path / "none.journal")
    if "sqlite" not in form and form != "{}":
        assert SECRET not in str(caught.value)


def test_whole_files_are_cleaned(tmp_path: Path) -> None:
    from optimizer.search.credentials import clean_file

    address = f"postgresql://bob:it's {SECRET}@host/db"
    hidden(address)
    file = tmp_path / "config.yaml"
    file.write_text("storage: 'postgresql://bob:it''s hunter2secret@host/db'\n")
    clean_file(file, write_atomically)
    assert SECRET not in file.read_text()
