"""Where the repository is published: the one setting that makes links to it, to Binder and to Colab appear."""
from __future__ import annotations

import re
from dataclasses import dataclass

from .. import records

CITATION = records.ROOT / "CITATION.cff"
_FORM = re.compile(r"https://(?P<host>[\w.-]+)/(?P<owner>[\w.-]+)/(?P<name>[\w.-]+?)(?:\.git)?/?")


@dataclass(frozen=True)
class Address:
    """A public repository, as in https://HOST/OWNER/NAME. ValueError for another form."""

    url: str
    branch: str = "main"

    def __post_init__(self):
        if not _FORM.fullmatch(self.url):
            raise ValueError(f"the repository's address must look like https://HOST/OWNER/NAME, got {self.url!r}")

    @property
    def path(self) -> str:
        """OWNER/NAME."""
        found = _FORM.fullmatch(self.url)
        return f"{found['owner']}/{found['name']}"

    def binder(self, file: str) -> str:
        return f"https://mybinder.org/v2/gh/{self.path}/{self.branch}?urlpath=lab/tree/{file}"

    def colab(self, file: str) -> str:
        return f"https://colab.research.google.com/github/{self.path}/blob/{self.branch}/{file}"

    def invitation(self, file: str) -> str:
        """A line of Markdown for the top of a notebook's page. Colab opens one file: its reader clones the rest."""
        name = self.path.partition("/")[2]
        return (f"Run it: [Binder]({self.binder(file)}) · [Colab]({self.colab(file)}), where this cell comes first: "
                f"`!git clone --depth 1 {self.url} && pip install -q -r {name}/requirements.txt`, "
                f"then `%cd {name}/notebooks`")


def known(given: str | None = None) -> Address | None:
    """The address that was given, else `repository-code` in CITATION.cff; None where there is neither.

    ValueError for an address of another form.
    """
    if given:
        return Address(given)
    found = re.search(r"^repository-code:\s*[\"']?([^\"'\s]+)", CITATION.read_text(encoding="utf-8"), re.M)
    return Address(found[1]) if found else None
