"""LICENSE and CITATION.cff agree with the package."""

import yaml

from flallm_ds import __version__
from tests.helpers.paths import ROOT


def test_the_citation_names_this_version_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["title"] == "flallm_ds" and citation["version"] == __version__
    assert citation["license"] == "Apache-2.0"
    paper = citation["preferred-citation"]
    assert paper["url"] == "https://arxiv.org/abs/2403.12556" and paper["year"] == 2024
    names = [author["family-names"] for author in paper["authors"]]
    assert names == ["Chen", "Zhou", "Li", "Wan", "Lei", "Jiang", "Lu", "Zhao"]


def test_the_license_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License\n                           Version 2.0" in text
    assert text.rstrip().endswith("limitations under the License.")
