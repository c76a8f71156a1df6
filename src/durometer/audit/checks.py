"""What each check looks at, and the weaknesses and techniques that it is about.

Ids of CWE (cwe.mitre.org), MITRE ATLAS (AML.*, atlas.mitre.org) and the OWASP Top 10 for
applications of language models, 2025 (LLM*).
"""

__all__ = ["CHECKS", "references"]

_ABLATION = ("LLM04:2025", "AML.T0018", "AML.T0058", "arXiv 2406.11717", "arXiv 2607.01854")

CHECKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "FF-00": ("every file could be read", ()),
    "FF-01": ("kinds of file that run code", ("CWE-502", "AML.T0011.000", "LLM03:2025")),
    "FF-02": ("pickles name nothing but tensors", ("CWE-502", "CWE-184", "AML.T0011.000")),
    "FF-03": ("damaged files that load all the same", ("AML.T0076",)),
    "FF-04": ("name and content agree", ("AML.T0074",)),
    "FF-05": ("safetensors headers", ("CWE-345", "AML.T0076")),
    "FF-06": ("suspicious metadata and invisible text", ("LLM03:2025",)),
    "FF-07": ("index and shards agree", ("CWE-345", "AML.T0074")),
    "FF-08": ("one set of weights", ("AML.T0074",)),
    "FF-09": ("GGUF headers", ("CWE-345", "AML.T0049")),
    "FF-10": ("GGUF declarations and tensors agree", ("AML.T0074",)),
    "FF-11": ("config.json and tensors agree", ("AML.T0018.001",)),
    "FF-12": ("values are numbers", ("AML.T0031",)),
    "FF-13": ("repeated matrices", ("LLM03:2025",)),
    "FF-14": ("secret keys left behind", ("LLM02:2025",)),
    "FF-15": ("edits that the files name themselves", ("LLM03:2025",)),
    "FF-16": ("links and special files", ("CWE-59",)),
    "FF-17": ("hidden, oddly named and unknown files", ("LLM03:2025",)),
    "FF-18": ("JSON names every key once", ("CWE-345",)),
    "PV-01": ("hashes against a manifest", ("CWE-494", "CWE-345", "AML.T0010.003")),
    "PV-02": ("signature", ("CWE-345", "AML.M0013")),
    "PV-03": ("origin against the user's claim", ("AML.T0109", "AML.T0073")),
    "PV-04": ("side files against the base's", ("LLM03:2025",)),
    "PV-05": ("claimed base against the weights", ("AML.T0073", "AML.T0074")),
    "CF-01": ("settings and files that run code", ("CWE-494", "AML.T0011.000", "AML.T0010.001")),
    "CF-02": ("generation settings", ("LLM04:2025", "AML.T0018")),
    "CF-03": ("architecture settings against the base's", ("AML.T0018.001",)),
    "CF-04": ("declared quantisation and tensors agree", ("AML.T0074",)),
    "CF-05": ("an adapter beside full weights", ("LLM03:2025", "AML.T0018")),
    "CT-01": ("carriers of the template agree", ("AML.T0074",)),
    "CT-02": ("template against the base's", ("LLM03:2025", "AML.T0018")),
    "CT-03": ("template escapes and hidden text", ("CWE-1336", "LLM03:2025", "AML.T0010.003")),
    "CT-04": ("conversations come through", ("LLM01:2025", "LLM04:2025", "AML.T0051.002")),
    "CT-05": ("triggers in the template", ("LLM01:2025", "LLM04:2025", "AML.T0051.002")),
    "CT-06": ("answers begun by the template", ("LLM04:2025", "AML.T0054")),
    "CT-07": ("templates that exhaust time or memory", ("LLM10:2025", "AML.T0029")),
    "CT-08": ("instructions against safeguards in the template", ("LLM01:2025",)),
    "TK-01": ("vocabulary", ("LLM03:2025", "LLM04:2025", "AML.T0018")),
    "TK-02": ("special tokens", ("LLM01:2025", "LLM04:2025", "AML.T0018")),
    "TK-03": ("steps that rewrite text", ("LLM03:2025", "AML.T0018")),
    "TK-04": ("number of tokens against the base's", ("LLM10:2025", "AML.T0034.001")),
    "TK-05": ("texts come back as they were", ("AML.T0010.003",)),
    "WF-00": ("every tensor could be compared", ("AML.T0031",)),
    "WF-01": ("the weights come from the base", ("AML.T0073", "AML.T0074", "arXiv 2312.04828")),
    "WF-02": ("number format against the base's", ("AML.M0014",)),
    "WF-03": ("where the weights differ from the base's", ("AML.T0018",)),
    "WF-04": ("scaled rows, columns or matrices", ("AML.T0018",)),
    "WF-10": ("a direction removed from what is written", _ABLATION),
    "WF-11": ("a direction that nothing writes", ("LLM04:2025", "AML.T0018")),
    "WF-12": ("a direction removed from what is read", _ABLATION),
    "WF-20": ("a low-rank change", ("LLM03:2025", "AML.T0018.000", "arXiv 2410.21228")),
    "WF-21": ("dense further training", ("AML.T0018",)),
    "WF-30": ("weights that became zero", ("AML.T0018", "AML.T0031", "arXiv 2402.05162")),
    "WF-31": ("noise on the weights", ("AML.T0031",)),
    "WF-40": ("combination of the given parents", ("LLM03:2025", "arXiv 2212.04089")),
    "WF-50": ("quantised tensors against the base's", ("AML.T0074", "arXiv 2405.18137")),
    "WF-53": ("16- or 32-bit weights on a quantised grid", ("AML.T0074",)),
    "WF-60": ("an edit of single layers", ("LLM09:2025", "AML.T0018")),
    "WF-61": ("gains and biases", ("AML.T0018",)),
    "WF-62": ("rows of the vocabulary", ("AML.T0018", "AML.T0043.004")),
    "BH-01": ("safeguard kept, against the base", ("LLM04:2025", "AML.T0031")),
    "BH-03": ("over-refusal, against the base", ("AML.T0031",)),
    "BL-01": ("accepted findings that have expired", ()),
}
"""By id: what is looked at, and the references of its findings."""


def references(check: str) -> tuple[str, ...]:
    """Return the references of a check's findings."""
    return CHECKS[check][1]
